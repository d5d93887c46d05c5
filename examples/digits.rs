//! A model and a dataset of one's own, trained by the same machinery as the built-in language model: tells apart generated
//! pictures of the digits 0 to 9, 8 by 8 pixels with noise.
//!
//!     cargo run --release --example digits -- train examples/digits.toml

use mattock::burn::nn::{Linear, LinearConfig, loss::CrossEntropyLossConfig};
use mattock::burn::prelude::*;
use mattock::burn::tensor::activation::relu;
use mattock::keys::Stream;
use mattock::{Carry, Facts, Kernels, Output, Pass, Source, Task, TaskError};

/// The digits, 5 rows of 3 pixels: an octal digit is a row.
const FONT: [u16; 10] =
    [0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71222, 0o75757, 0o75717];
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
fn image(index: u64, noise: f64) -> ([f32; PIXELS], i32) {
    let mut random = Stream::new(index);
    let (left, top) = ((random.uniform() * 6.0) as usize, (random.uniform() * 4.0) as usize);
    let mut pixels = std::array::from_fn(|_| (random.uniform() * noise) as f32);
    for bit in (0..15).filter(|bit| (FONT[index as usize % 10] >> (14 - bit)) & 1 == 1) {
        pixels[(top + bit / 3) * 8 + left + bit % 3] += 1.0;
    }
    (pixels, (index % 10) as i32)
}

impl Task for Digits {
    type Block<B: Backend> = Classifier<B>;
    type Batch = (Vec<[f32; PIXELS]>, Vec<i32>);

    fn open(source: &Source<'_>) -> Result<Self, TaskError> {
        Ok(Self { model: source.model()?, data: source.data()? })
    }

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> impl Iterator<Item = Classifier<B>> {
        B::seed(device, seed);
        let hidden = LinearConfig::new(PIXELS, self.model.hidden).init(device);
        let output = LinearConfig::new(self.model.hidden, 10).init(device);
        std::iter::once(Classifier { hidden, output })
    }

    fn samples(&self) -> u64 {
        self.data.images
    }

    fn batch(&self, samples: &[u64]) -> Result<Self::Batch, TaskError> {
        Ok(samples.iter().map(|&index| image(index, self.data.noise)).unzip())
    }

    fn held_out(&self, size: usize) -> Result<Vec<(usize, Self::Batch)>, TaskError> {
        let unseen: Vec<u64> = (self.data.images..self.data.images + 500).collect();
        unseen.chunks(size).map(|chunk| Ok((chunk.len(), self.batch(chunk)?))).collect()
    }

    fn forward<B: Kernels>(
        &self,
        block: &Classifier<B>,
        _: Option<Carry<B>>,
        (images, digits): &Self::Batch,
        _: Pass,
    ) -> Output<B> {
        let device = block.hidden.weight.device();
        let x = Tensor::<B, 2>::from_data(TensorData::new(images.concat(), [images.len(), PIXELS]), &device);
        let labels = Tensor::<B, 1, Int>::from_data(&digits[..], &device);
        let logits = block.output.forward(relu(block.hidden.forward(x)));
        Output::Loss(CrossEntropyLossConfig::new().init(&device).forward(logits, labels))
    }

    fn facts(&self) -> Facts {
        Facts { dataset_hash: format!("digits-{}-{}", self.data.images, self.data.noise), ..Facts::default() }
    }
}

fn main() -> std::process::ExitCode {
    mattock::main::<Digits>()
}
