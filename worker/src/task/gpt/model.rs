//! The blocks of the language model: embeddings, decoder layers, head.
//!
//! Parameters are named and laid out as in Hugging Face's GPT-2 (weights of linear layers are `[inputs, outputs]`),
//! so that a checkpoint is their dotted paths and nothing else.

use burn::module::{Module, Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use mattock_data::keys::{MicroBatchKey, Normal};

use super::GptConfig;
use crate::task::{Carry, Output, Pass};
use mattock_kernels::Kernels;

/// Under the root of layer norm, as GPT-2 has it.
pub(super) const NORM_EPSILON: f64 = 1e-5;
/// Standard deviation of initial weights, as GPT-2 has it.
pub(super) const INITIAL_STD: f64 = 0.02;

/// One block of the sequence.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "made once a layer, and Burn's modules cannot be boxed")]
pub enum GptBlock<B: Backend> {
    /// Tokens and positions to vectors.
    Embed(Embed<B>),
    /// Attention and MLP.
    Layer(Layer<B>),
    /// Vectors to logits, and the loss.
    Head(Head<B>),
}

/// Token and position embeddings.
#[derive(Module, Debug)]
pub struct Embed<B: Backend> {
    wte: Table<B>,
    wpe: Table<B>,
    dropout: f64,
    tied: bool,
}

/// A decoder block.
#[derive(Module, Debug)]
pub struct Layer<B: Backend> {
    ln_1: Norm<B>,
    attn: Attention<B>,
    ln_2: Norm<B>,
    mlp: Mlp<B>,
    index: usize,
    dropout: f64,
}

/// Final norm and output projection; the projection is absent where it is tied to the embedding.
#[derive(Module, Debug)]
pub struct Head<B: Backend> {
    ln_f: Norm<B>,
    lm_head: Option<Table<B>>,
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    c_attn: Linear<B>,
    c_proj: Linear<B>,
    heads: usize,
}

#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    c_fc: Linear<B>,
    c_proj: Linear<B>,
}

/// A matrix of rows by index, `[rows, dim]`.
#[derive(Module, Debug)]
struct Table<B: Backend> {
    weight: Param<Tensor<B, 2>>,
}

/// `[inputs, outputs]` and `[outputs]`.
#[derive(Module, Debug)]
struct Linear<B: Backend> {
    weight: Param<Tensor<B, 2>>,
    bias: Param<Tensor<B, 1>>,
}

#[derive(Module, Debug)]
struct Norm<B: Backend> {
    weight: Param<Tensor<B, 1>>,
    bias: Param<Tensor<B, 1>>,
}

/// Draws initial parameters, one after the other in the order of the model.
struct Initial<'a, B: Backend> {
    /// None for shapes without values.
    normal: Option<Normal>,
    device: &'a B::Device,
}

impl<B: Backend> Initial<'_, B> {
    /// The next block of the model.
    fn block(&mut self, config: &GptConfig, vocab: usize, index: usize) -> GptBlock<B> {
        let GptConfig { layers, heads, dim, context, tied, dropout, .. } = *config;
        // GPT-2 scales what is added to the residual stream by the number of additions.
        let residual_std = INITIAL_STD / ((2 * layers) as f64).sqrt();
        if index == 0 {
            let (wte, wpe) = (self.table(vocab, dim), self.table(context, dim));
            return GptBlock::Embed(Embed { wte, wpe, dropout, tied });
        }
        if index > layers {
            let lm_head = (!tied).then(|| self.table(vocab, dim));
            return GptBlock::Head(Head { ln_f: self.norm(dim), lm_head });
        }
        GptBlock::Layer(Layer {
            ln_1: self.norm(dim),
            attn: Attention {
                c_attn: self.linear(dim, 3 * dim, INITIAL_STD),
                c_proj: self.linear(dim, dim, residual_std),
                heads,
            },
            ln_2: self.norm(dim),
            mlp: Mlp {
                c_fc: self.linear(dim, 4 * dim, INITIAL_STD),
                c_proj: self.linear(4 * dim, dim, residual_std),
            },
            index: index - 1,
            dropout,
        })
    }

    fn matrix(&mut self, rows: usize, columns: usize, std: f64) -> Param<Tensor<B, 2>> {
        let Some(normal) = &mut self.normal else { return self.hollow([rows, columns]) };
        let values: Vec<f32> = (0..rows * columns).map(|_| (normal.draw() * std) as f32).collect();
        Param::from_data(TensorData::new(values, [rows, columns]), self.device)
    }

    fn table(&mut self, rows: usize, dim: usize) -> Table<B> {
        Table { weight: self.matrix(rows, dim, INITIAL_STD) }
    }

    fn linear(&mut self, inputs: usize, outputs: usize, std: f64) -> Linear<B> {
        let weight = self.matrix(inputs, outputs, std);
        Linear { weight, bias: self.constant(outputs, 0.0) }
    }

    fn norm(&mut self, dim: usize) -> Norm<B> {
        Norm { weight: self.constant(dim, 1.0), bias: self.constant(dim, 0.0) }
    }

    fn constant(&self, length: usize, value: f32) -> Param<Tensor<B, 1>> {
        if self.normal.is_none() {
            return self.hollow([length]);
        }
        Param::from_data(TensorData::new(vec![value; length], [length]), self.device)
    }

    fn hollow<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<B, D>> {
        let zeros = move |device: &B::Device, _: bool| Tensor::zeros(shape, device);
        Param::uninitialized(ParamId::new(), zeros, self.device.clone(), true, shape.into())
    }
}

/// The whole model with its initial parameters, a pure function of configuration and seed; without a seed, without values:
/// parameters have names and shapes, and take no memory.
pub(super) fn blocks<B: Backend>(
    config: &GptConfig,
    vocab: usize,
    seed: Option<u64>,
    device: &B::Device,
) -> impl Iterator<Item = GptBlock<B>> {
    let mut initial = Initial { normal: seed.map(Normal::new), device };
    (0..config.layers + 2).map(move |index| initial.block(config, vocab, index))
}

/// Inputs and targets of a micro-batch, `[batch, time]` each.
pub(super) struct Tokens<B: Backend> {
    pub(super) inputs: Tensor<B, 2, Int>,
    pub(super) targets: Tensor<B, 1, Int>,
}

impl<B: Kernels> GptBlock<B> {
    /// Runs the block; the head ends in the loss.
    pub(super) fn forward(
        &self,
        input: Option<Carry<B>>,
        tokens: impl FnOnce(&B::Device) -> Tokens<B>,
        pass: Pass,
    ) -> Output<B> {
        match (self, input) {
            (Self::Embed(embed), _) => Output::Next(embed.forward(tokens(&embed.device()).inputs, pass)),
            (Self::Layer(layer), Some(carry)) => Output::Next(layer.forward(&carry, pass)),
            (Self::Head(head), Some(carry)) => {
                let logits = head.logits(&carry);
                let [batch, time, vocab] = logits.dims();
                let targets = tokens(&logits.device()).targets;
                Output::Loss(B::cross_entropy(logits.reshape([batch * time, vocab]), targets))
            }
            (Self::Layer(_) | Self::Head(_), None) => unreachable!("only the embedding starts the sequence"),
        }
    }
}

impl<B: Kernels> Embed<B> {
    pub(super) fn device(&self) -> B::Device {
        self.wte.weight.val().device()
    }

    /// `inputs [b, t]` to `[b, t, d]`, and the embedding itself where the head is tied to it.
    pub(super) fn forward(&self, inputs: Tensor<B, 2, Int>, pass: Pass) -> Carry<B> {
        let time = inputs.dims()[1];
        let table = self.wte.weight.val();
        let dim = table.dims()[1];
        let positions = self.wpe.weight.val().slice([0..time, 0..dim]);
        let x = burn::tensor::module::embedding(table.clone(), inputs) + positions.unsqueeze::<3>();
        let carry = Carry::default().with(dropout(x, self.dropout, pass, 0));
        if self.tied { carry.with(table) } else { carry }
    }
}

impl<B: Kernels> Layer<B> {
    pub(super) fn forward(&self, carry: &Carry<B>, pass: Pass) -> Carry<B> {
        let x = carry.get::<3>(0);
        let branch = 1 + 2 * self.index as u64;
        let attended = self.attn.forward(self.ln_1.forward(x.clone()));
        let x = x + dropout(attended, self.dropout, pass, branch);
        let thought = self.mlp.forward(self.ln_2.forward(x.clone()));
        let x = x + dropout(thought, self.dropout, pass, branch + 1);
        let next = Carry::default().with(x);
        if carry.len() == 2 { next.with(carry.get::<2>(1)) } else { next }
    }
}

impl<B: Kernels> Head<B> {
    /// `[b, t, d]` to `[b, t, v]`.
    pub(super) fn logits(&self, carry: &Carry<B>) -> Tensor<B, 3> {
        let x = self.ln_f.forward(carry.get::<3>(0));
        let [batch, time, dim] = x.dims();
        let table = match &self.lm_head {
            Some(head) => head.weight.val(),
            None => carry.get::<2>(1),
        };
        let vocab = table.dims()[0];
        x.reshape([batch * time, dim]).matmul(table.transpose()).reshape([batch, time, vocab])
    }
}

impl<B: Kernels> Attention<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.c_proj.forward(<B as Kernels>::attention(self.c_attn.forward(x), self.heads))
    }
}

impl<B: Kernels> Mlp<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.c_proj.forward(<B as Kernels>::gelu(self.c_fc.forward(x)))
    }
}

impl<B: Kernels> Linear<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        <B as Kernels>::linear(x, self.weight.val(), self.bias.val())
    }
}

impl<B: Kernels> Norm<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        B::norm(x, self.weight.val(), self.bias.val(), NORM_EPSILON)
    }
}

/// Zeroes elements with probability `p` and scales the rest, by a mask that is a pure function of micro-batch and
/// place.
fn dropout<B: Backend>(x: Tensor<B, 3>, p: f64, pass: Pass, place: u64) -> Tensor<B, 3> {
    match pass {
        Pass::Train(key) if p > 0.0 => {
            let shape = x.dims();
            let mask = TensorData::new(mask(key, place, p, shape.iter().product()), shape);
            let device = x.device();
            x * Tensor::from_data(mask, &device)
        }
        Pass::Train(_) | Pass::Evaluate => x,
    }
}

fn mask(key: MicroBatchKey, place: u64, p: f64, length: usize) -> Vec<f32> {
    let mut stream = key.stream(place);
    let kept = (1.0 / (1.0 - p)) as f32;
    (0..length).map(|_| if stream.uniform() < p { 0.0 } else { kept }).collect()
}
