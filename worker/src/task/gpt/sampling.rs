//! Draws text from a checkpoint's model, one token at a time, over at most its context.

use burn::tensor::{Int, Tensor, TensorData};
use mattock_data::keys::Stream;
use mattock_data::{DataError, Tokenizer};
use mattock_kernels::{Cpu, Kernels};

use super::model::blocks;
use super::pretrained::{Pretrained, PretrainedError};
use super::{GptBlock, GptConfig};
use crate::params::{Space, attach};
use crate::task::{Carry, Pass, Sampling};

/// Why a checkpoint cannot be drawn from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GeneratorError {
    /// Not a model of this family.
    #[error("config.json is not that of a GPT-2 model: {0}")]
    Config(String),
    /// No weights of such a model.
    #[error("{0}")]
    Weights(String),
    /// No tokenizer that fits.
    #[error(transparent)]
    Tokenizer(#[from] DataError),
    /// A tokenizer of another model.
    #[error("{place}: the tokenizer has {tokens} tokens, the model {vocab}")]
    Vocabulary {
        /// The folder of both.
        place: String,
        /// The tokenizer's.
        tokens: usize,
        /// The model's.
        vocab: usize,
    },
}

/// A language model without its data: configuration and tokenizer, as they lie in a checkpoint.
#[derive(Debug)]
pub struct Generator {
    config: GptConfig,
    vocab: usize,
    tokenizer: Tokenizer,
}

impl Generator {
    /// Reads a checkpoint's `config.json` and `tokenizer.json`.
    ///
    /// # Errors
    /// See [`GeneratorError`].
    pub fn new(config_json: &str, tokenizer_json: &[u8]) -> Result<Self, GeneratorError> {
        let (config, vocab) = GptConfig::from_hugging_face(config_json).map_err(GeneratorError::Config)?;
        Ok(Self { config, vocab, tokenizer: Tokenizer::from_json(tokenizer_json.to_vec())? })
    }

    /// Reads a folder of weights in Hugging Face's layout that has a `tokenizer.json`; returns the parameters as well.
    ///
    /// # Errors
    /// See [`GeneratorError`].
    pub fn open(url: &str) -> Result<(Self, Vec<f32>), GeneratorError> {
        let weights = |error: PretrainedError| GeneratorError::Weights(error.to_string());
        let (pretrained, config, vocab) = Pretrained::open_any(url).map_err(weights)?;
        let json = pretrained.tokenizer().map_err(weights)?;
        let generator = Self { config, vocab, tokenizer: Tokenizer::from_json(json.into_bytes())? };
        let tokens = generator.tokenizer.vocab();
        if tokens > vocab {
            return Err(GeneratorError::Vocabulary { place: url.to_owned(), tokens, vocab });
        }
        let parameters = pretrained.load(&generator.space()).map_err(weights)?;
        Ok((generator, parameters))
    }

    fn blocks(&self) -> Vec<GptBlock<Cpu>> {
        blocks(&self.config, self.vocab, None, &Default::default()).collect()
    }

    /// Where the model's parameters lie.
    pub fn space(&self) -> Space {
        Space::of(self.blocks(), |index| self.config.prefix(index))
    }

    /// Continues `prompt` by as many tokens as asked for; returns prompt and continuation.
    ///
    /// # Errors
    /// Where the prompt cannot be tokenised.
    pub fn text(&self, parameters: &[f32], prompt: &str, request: &Sampling) -> Result<String, DataError> {
        let space = self.space();
        let blocks = self.blocks().into_iter().zip(space.buckets());
        let device = Default::default();
        let blocks: Vec<GptBlock<Cpu>> =
            blocks.map(|(block, range)| attach(block, &parameters[range.clone()], &device)).collect();
        let mut tokens = self.tokenizer.encode(prompt)?;
        if tokens.is_empty() {
            tokens = self.tokenizer.encode("\n")?;
        }
        let mut stream = Stream::new(request.seed);
        for _ in 0..request.tokens {
            let seen = &tokens[tokens.len().saturating_sub(self.config.context)..];
            tokens.push(draw(&next_logits(&blocks, seen), request.temperature, &mut stream));
        }
        self.tokenizer.decode(&tokens)
    }
}

/// Logits of the token after `seen`, `[vocab]`.
fn next_logits<B: Kernels>(blocks: &[GptBlock<B>], seen: &[u32]) -> Vec<f32> {
    let mut carry = Carry::default();
    for block in blocks {
        carry = match block {
            GptBlock::Embed(embed) => {
                let ids: Vec<i32> = seen.iter().map(|&id| id as i32).collect();
                let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [seen.len()]), &embed.device());
                embed.forward(ids.unsqueeze::<2>(), Pass::Evaluate)
            }
            GptBlock::Layer(layer) => layer.forward(&carry, Pass::Evaluate),
            GptBlock::Head(head) => return last_row(head.logits(&carry)),
        };
    }
    unreachable!("a model ends in its head")
}

fn last_row<B: Kernels>(logits: Tensor<B, 3>) -> Vec<f32> {
    let [_, time, vocab] = logits.dims();
    logits.slice([0..1, time - 1..time, 0..vocab]).into_data().convert::<f32>().iter::<f32>().collect()
}

fn draw(logits: &[f32], temperature: f64, stream: &mut Stream) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if temperature <= 0.0 {
        return logits.iter().position(|&logit| logit == best).unwrap_or(0) as u32;
    }
    let weights: Vec<f64> =
        logits.iter().map(|&logit| libm::exp(f64::from(logit - best) / temperature)).collect();
    let mut left = stream.uniform() * weights.iter().sum::<f64>();
    let chosen = weights.iter().position(|weight| {
        left -= weight;
        left <= 0.0
    });
    chosen.unwrap_or(logits.len() - 1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cold_draw_is_the_likeliest_and_a_warm_one_follows_the_weights() {
        let mut stream = Stream::new(1);
        assert_eq!(draw(&[0.0, 2.0, 1.0], 0.0, &mut stream), 1);
        let warm = (0..1000).filter(|_| draw(&[0.0, 3f32.ln()], 1.0, &mut stream) == 1).count();
        assert!((700..800).contains(&warm), "{warm} of 1000 where three quarters are due");
    }
}
