//! A model and a dataset of one's own, trained by the same machinery as the built-in language model:
//!
//!     cargo run --release --example digits -- train examples/digits.toml
//!
//! The task: tell apart generated pictures of the digits 0 to 9, 8 by 8 pixels with noise.

use mattock::burn::config::Config;
use mattock::burn::module::Module;
use mattock::burn::nn::loss::CrossEntropyLossConfig;
use mattock::burn::nn::{Linear, LinearConfig};
use mattock::burn::tensor::backend::Backend;
use mattock::burn::tensor::{Int, Tensor, TensorData, activation};
use mattock::keys::Stream;
use mattock::{Carry, Facts, Kernels, Output, Pass, Source, Task, TaskError};

/// Rows of 5 by 3 pixels, top to bottom, as bits.
const FONT: [[u8; 5]; 10] = [
    [7, 5, 5, 5, 7],
    [2, 6, 2, 2, 7],
    [7, 1, 7, 4, 7],
    [7, 1, 7, 1, 7],
    [5, 5, 7, 1, 1],
    [7, 4, 7, 1, 7],
    [7, 4, 7, 5, 7],
    [7, 1, 2, 2, 2],
    [7, 5, 7, 5, 7],
    [7, 5, 7, 1, 7],
];
const PIXELS: usize = 64;

#[derive(Config, Debug)]
struct ModelConfig {
    family: String,
    hidden: usize,
}

#[derive(Config, Debug)]
struct DataConfig {
    images: u64,
    noise: f64,
}

#[derive(Module, Debug)]
struct Classifier<B: Backend> {
    hidden: Linear<B>,
    output: Linear<B>,
}

struct Digits {
    model: ModelConfig,
    data: DataConfig,
}

/// Image `index`: a digit at a random place, and which digit it is.
fn image(index: u64, noise: f64) -> (Vec<f32>, i32) {
    let mut random = Stream::new(index);
    let digit = (index % 10) as usize;
    let (left, top) = ((random.uniform() * 6.0) as usize, (random.uniform() * 4.0) as usize);
    let mut pixels: Vec<f32> = (0..PIXELS).map(|_| (random.uniform() * noise) as f32).collect();
    for (y, row) in FONT[digit].iter().enumerate() {
        for x in (0..3).filter(|x| (row >> (2 - x)) & 1 == 1) {
            pixels[(top + y) * 8 + left + x] += 1.0;
        }
    }
    (pixels, digit as i32)
}

impl Task for Digits {
    type Block<B: Backend> = Classifier<B>;
    type Batch = Vec<(Vec<f32>, i32)>;

    fn open(source: &Source<'_>) -> Result<Self, TaskError> {
        Ok(Self { model: source.model()?, data: source.data()? })
    }

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> Vec<Classifier<B>> {
        B::seed(device, seed);
        let hidden = LinearConfig::new(PIXELS, self.model.hidden).init(device);
        vec![Classifier { hidden, output: LinearConfig::new(self.model.hidden, 10).init(device) }]
    }

    fn samples(&self) -> u64 {
        self.data.images
    }

    fn batch(&self, samples: &[u64]) -> Self::Batch {
        samples.iter().map(|&index| image(index, self.data.noise)).collect()
    }

    fn held_out(&self, size: usize) -> Vec<(usize, Self::Batch)> {
        let unseen: Vec<u64> = (self.data.images..self.data.images + 500).collect();
        unseen.chunks(size).map(|chunk| (chunk.len(), self.batch(chunk))).collect()
    }

    fn forward<B: Kernels>(
        &self,
        block: &Classifier<B>,
        _: Option<Carry<B>>,
        batch: &Self::Batch,
        _: Pass,
    ) -> Output<B> {
        let device = block.hidden.weight.device();
        let pixels: Vec<f32> = batch.iter().flat_map(|(pixels, _)| pixels).copied().collect();
        let labels: Vec<i32> = batch.iter().map(|(_, label)| *label).collect();
        let x = Tensor::<B, 2>::from_data(TensorData::new(pixels, [batch.len(), PIXELS]), &device);
        let labels = Tensor::<B, 1, Int>::from_data(TensorData::new(labels, [batch.len()]), &device);
        let logits = block.output.forward(activation::relu(block.hidden.forward(x)));
        Output::Loss(CrossEntropyLossConfig::new().init(&device).forward(logits, labels))
    }

    fn facts(&self) -> Facts {
        Facts { dataset_hash: format!("digits-{}-{}", self.data.images, self.data.noise), ..Facts::default() }
    }
}

fn main() -> std::process::ExitCode {
    mattock::main::<Digits>()
}
