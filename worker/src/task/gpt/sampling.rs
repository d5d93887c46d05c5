//! Draws text from a model, one token at a time, over at most its context.

use burn::tensor::{Int, Tensor, TensorData};
use mattock_data::Tokenizer;
use mattock_data::keys::Stream;

use super::GptBlock;
use mattock_kernels::Kernels;
use crate::task::{Output, Pass, Sampling};

/// Continues `prompt` by as many tokens as asked for; returns prompt and continuation.
pub(super) fn text<B: Kernels>(
    blocks: &[GptBlock<B>],
    tokenizer: &Tokenizer,
    context: usize,
    prompt: &str,
    request: &Sampling,
) -> Result<String, mattock_data::DataError> {
    let mut tokens: Vec<u32> = tokenizer.encode(prompt)?;
    if tokens.is_empty() {
        tokens.push(0);
    }
    let mut stream = Stream::new(request.seed);
    for _ in 0..request.tokens {
        let seen = &tokens[tokens.len().saturating_sub(context)..];
        let logits = next_logits(blocks, seen);
        tokens.push(draw(&logits, request.temperature, &mut stream));
    }
    tokenizer.decode(&tokens)
}

/// Logits of the token after `seen`, `[vocab]`.
fn next_logits<B: Kernels>(blocks: &[GptBlock<B>], seen: &[u32]) -> Vec<f32> {
    let mut carry = None;
    for block in blocks {
        let output = match block {
            GptBlock::Embed(embed) => {
                let ids: Vec<i32> = seen.iter().map(|&id| id as i32).collect();
                let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [seen.len()]), &embed.device());
                Output::Next(embed.forward(ids.unsqueeze::<2>(), Pass::Evaluate))
            }
            GptBlock::Layer(layer) => match &carry {
                Some(carry) => Output::Next(layer.forward(carry, Pass::Evaluate)),
                None => unreachable!("the embedding comes first"),
            },
            GptBlock::Head(head) => match &carry {
                Some(carry) => return last_row(head.logits(carry)),
                None => unreachable!("the embedding comes first"),
            },
        };
        carry = match output {
            Output::Next(carry) => Some(carry),
            Output::Loss(_) => None,
        };
    }
    Vec::new()
}

fn last_row<B: Kernels>(logits: Tensor<B, 3>) -> Vec<f32> {
    let [_, time, vocab] = logits.dims();
    logits.slice([0..1, time - 1..time, 0..vocab]).into_data().convert::<f32>().into_vec().unwrap_or_default()
}

fn draw(logits: &[f32], temperature: f64, stream: &mut Stream) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if temperature <= 0.0 {
        return logits.iter().position(|&logit| logit == best).unwrap_or(0) as u32;
    }
    let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit - best) / temperature).exp()).collect();
    let mut left = stream.uniform() * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        left -= weight;
        if left <= 0.0 {
            return index as u32;
        }
    }
    (logits.len() - 1) as u32
}
