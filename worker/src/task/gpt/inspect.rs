//! What a model computes for given tokens, for comparison with other programs: logits, loss and gradients.

use burn::backend::Autodiff;
use burn::tensor::{ElementConversion, Tensor};
use mattock_kernels::{Cpu, TrainBackend};

use super::model::blocks;
use super::pretrained::{self, Pretrained};
use super::{GptBlock, TokenBatch};
use crate::params::{Parameter, Space, attach, collect_gradients};
use crate::task::{Carry, Output, Pass, TaskError};

/// What a model computes for a row of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspected {
    /// Logits after each token, `[tokens][vocab]`.
    pub logits: Vec<Vec<f32>>,
    /// Mean cross entropy, in nats, of each token after the first.
    pub loss: f32,
    /// Of each parameter, the gradient of the loss, in row-major order.
    pub gradients: Vec<(Parameter, Vec<f32>)>,
}

/// Reads the folder of a checkpoint, ours or one that `transformers` wrote, and runs its GPT-2 on the CPU, forward and backward.
///
/// # Errors
/// Where the weights cannot be read, or the tokens do not fit the model.
pub fn inspect(url: &str, tokens: &[u32]) -> Result<Inspected, TaskError> {
    let other = |error: String| TaskError::Other(error);
    let (pretrained, config, vocab) = Pretrained::open_any(url).map_err(|error| other(error.to_string()))?;
    if !(2..=config.context).contains(&tokens.len()) {
        let (given, most) = (tokens.len(), config.context);
        return Err(other(format!(
            "{given} tokens where 2 to {most} fit, the context of the model in {url}"
        )));
    }
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
        return Err(other(format!("token {token} is beyond the {vocab} of the model in {url}")));
    }
    let space = pretrained::space(&config, vocab);
    let parameters = pretrained.load(&space).map_err(|error| other(error.to_string()))?;
    type Backend = Autodiff<Cpu>;
    let device = Default::default();
    let blocks = blocks::<Backend>(&config, vocab, None, &device).zip(space.buckets());
    let blocks: Vec<GptBlock<Backend>> =
        blocks.map(|(block, range)| attach(block, &parameters[range.clone()], &device)).collect();
    Ok(run(&blocks, &space, tokens))
}

fn run<B: TrainBackend>(blocks: &[GptBlock<B>], space: &Space, tokens: &[u32]) -> Inspected {
    let row = |tokens: &[u32]| TokenBatch { tokens: tokens.iter().map(|&id| id as i32).collect(), rows: 1 };
    // A row of a batch ends in a token that is only a target.
    let all = row(&[tokens, &tokens[..1]].concat());
    let logits = forward(blocks, &all).0;
    let loss = forward(blocks, &row(tokens)).1;
    let mut gradients = loss.backward();
    let mut flat = vec![0.0; space.len()];
    for (block, range) in blocks.iter().zip(space.buckets()) {
        collect_gradients(block, &mut gradients, &mut flat[range.clone()]);
    }
    let [_, _, vocab] = logits.dims();
    let logits: Vec<f32> = logits.into_data().convert::<f32>().iter::<f32>().collect();
    let of = |parameter: &Parameter| (parameter.clone(), flat[parameter.range()].to_vec());
    Inspected {
        logits: logits.chunks(vocab).map(<[f32]>::to_vec).collect(),
        loss: loss.into_scalar().elem(),
        gradients: space.parameters().iter().map(of).collect(),
    }
}

/// Logits `[1, t, v]` and mean loss of a batch.
fn forward<B: TrainBackend>(blocks: &[GptBlock<B>], batch: &TokenBatch) -> (Tensor<B, 3>, Tensor<B, 1>) {
    let mut carry = None;
    let mut logits = None;
    for block in blocks {
        if let (GptBlock::Head(head), Some(carry)) = (block, &carry) {
            logits = Some(head.logits(carry));
        }
        match block.forward(carry.take(), |device| batch.tensors(device), Pass::Evaluate) {
            Output::Next(next) => carry = Some::<Carry<B>>(next),
            Output::Loss(loss) => return (logits.expect("the head follows other blocks"), loss),
        }
    }
    unreachable!("a model ends in its head")
}
