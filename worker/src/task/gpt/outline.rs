//! Shapes of the language model, from the recipe alone: no text is read, and no parameter drawn.

use mattock_data::config::{TextConfig, TokenizerFile, TokenizerKind};
use mattock_data::{Tokenizer, TokenizerConfig};
use mattock_kernels::Cpu;

use super::{GptConfig, model};
use crate::params::Space;
use crate::task::{Activations, Outline, Source, TaskError};

/// Bytes of a number.
const NUMBER: u64 = 4;
/// Queries of a tile, as in the kernels for the CPU.
const TILE: usize = 64;

/// Tokens of the vocabulary. One that will be trained on the text has the size that the recipe asks for; a text that is too
/// short for it gives a smaller one. A published dataset is opened, for only it knows.
pub(super) fn vocab(source: &Source<'_>) -> Result<usize, TaskError> {
    if source.data.contains_key("url") {
        return Ok(super::open(source)?.tokenizer().vocab());
    }
    let config: TextConfig = source.data()?;
    match config.tokenizer {
        TokenizerConfig::Kind(TokenizerKind::Bytes {}) => Ok(256),
        TokenizerConfig::Kind(TokenizerKind::Bpe { vocab }) => Ok(vocab as usize),
        TokenizerConfig::File(TokenizerFile { file }) => Ok(Tokenizer::from_file(&file)?.vocab()),
    }
}

pub(super) fn of(config: &GptConfig, vocab: usize) -> Outline {
    let device = Default::default();
    let blocks = model::blocks::<Cpu>(config, vocab, None, &device);
    Outline {
        space: Space::of(blocks, |index| config.prefix(index)),
        tokens_per_sample: config.context as u64,
        activations: Some(activations(config, vocab)),
    }
}

/// What the fused kernels of the CPU keep for their way back (`kernels/src/cpu/graph.rs`).
fn activations(config: &GptConfig, vocab: usize) -> Vec<Activations> {
    let GptConfig { layers, heads, dim, context, dropout, .. } = *config;
    let row = dim as u64;
    let (time, mask) = (context as u64, if dropout > 0.0 { row } else { 0 });
    // Mean and deviation.
    let norm = 2;
    let embed = Activations { kept: NUMBER * time * (1 + mask), output: NUMBER * time * row };
    // Outputs of both norms, q, k and v, of attention, the sum after it, what goes into GELU, and what comes out.
    let rows = row + row + 3 * row + row + row + 4 * row + 4 * row;
    let weights = heads as u64 * attention_weights(context);
    let kept = NUMBER * (time * (rows + 2 * norm + 2 * mask) + weights);
    let layer = Activations { kept, output: NUMBER * time * row };
    // The norm's output, probabilities in the logits' place, and targets.
    let head = Activations { kept: NUMBER * time * (row + norm + vocab as u64 + 1), output: 0 };
    let layers = std::iter::repeat_n(layer, layers);
    std::iter::once(embed).chain(layers).chain([head]).collect()
}

/// Weights of one head: a triangle of tiles.
fn attention_weights(context: usize) -> u64 {
    let tile = |first: usize| {
        let queries = TILE.min(context - first);
        (queries * (first + queries)) as u64
    };
    (0..context).step_by(TILE).map(tile).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::gpt::config::Family;

    fn config(tied: bool) -> GptConfig {
        GptConfig {
            family: Family::Gpt,
            layers: 3,
            heads: 2,
            dim: 8,
            context: 100,
            tied,
            dropout: 0.0,
            init: None,
            init_hash: None,
        }
    }

    #[test]
    fn shapes_without_values_are_those_of_the_model() {
        for tied in [false, true] {
            let config = config(tied);
            let device = Default::default();
            let blocks = model::blocks::<Cpu>(&config, 300, Some(1), &device);
            assert_eq!(of(&config, 300).space, Space::of(blocks, |index| config.prefix(index)));
        }
    }

    #[test]
    fn a_model_that_no_machine_holds_has_an_outline() {
        let config = GptConfig { layers: 400, heads: 128, dim: 16384, context: 4096, ..config(true) };
        assert!(of(&config, 100_000).space.parameter_count() > 1_000_000_000_000);
    }

    #[test]
    fn activations_of_small_shapes_are_those_counted_by_hand() {
        // 64 queries of 64 keys, and 36 of 100.
        assert_eq!(attention_weights(100), 64 * 64 + 36 * 100);
        let blocks = activations(&config(true), 300);
        assert_eq!(blocks.len(), 5);
        assert_eq!(blocks[0], Activations { kept: 400, output: 3200 });
        assert_eq!(blocks[1], Activations { kept: 4 * (100 * (15 * 8 + 4) + 2 * 7696), output: 3200 });
        assert_eq!(blocks[4], Activations { kept: 4 * 100 * (8 + 2 + 300 + 1), output: 0 });
    }
}
