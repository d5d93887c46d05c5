//! The trainer in one process: ranks as threads over in-memory links.

use std::thread;

use burn::backend::Autodiff;
use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, activation};
use mattock_collectives::{Group, GroupConfig, WorldSize, memory};
use mattock_data::keys::Stream;
use mattock_kernels::{Cpu, Kernels};

use super::Trainer;
use crate::plan::{self, AdamW, Batch, Bits, NonFinite, Plan, Reduce, Schedule, Sum};
use crate::state::State;
use crate::task::{Carry, Facts, Output, Pass, Source, Task, TaskError};

const WIDTH: usize = 37;

/// Two blocks of a regression on generated points; the second shares the first's matrix through the carry.
struct Toy;

#[derive(Module, Debug)]
struct ToyBlock<B: Backend> {
    weight: Param<Tensor<B, 2>>,
    bias: Param<Tensor<B, 1>>,
}

impl Task for Toy {
    type Block<B: Backend> = ToyBlock<B>;
    type Batch = (Vec<f32>, usize);

    fn open(_: &Source<'_>) -> Result<Self, TaskError> {
        Ok(Self)
    }

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> Vec<ToyBlock<B>> {
        let mut stream = Stream::new(seed);
        let mut draw = |count| (0..count).map(|_| (stream.uniform() - 0.5) as f32).collect::<Vec<f32>>();
        let mut block = || ToyBlock {
            weight: Param::from_data(TensorData::new(draw(WIDTH * WIDTH), [WIDTH, WIDTH]), device),
            bias: Param::from_data(TensorData::new(draw(WIDTH), [WIDTH]), device),
        };
        vec![block(), block()]
    }

    fn prefix(&self, index: usize) -> String {
        format!("layer.{index}")
    }

    fn samples(&self) -> u64 {
        1000
    }

    fn batch(&self, samples: &[u64]) -> Self::Batch {
        let row = |&sample: &u64| {
            let mut stream = Stream::new(sample);
            (0..WIDTH).map(move |_| stream.uniform() as f32).collect::<Vec<f32>>()
        };
        (samples.iter().flat_map(row).collect(), samples.len())
    }

    fn forward<B: Kernels>(
        &self,
        block: &ToyBlock<B>,
        input: Option<Carry<B>>,
        (points, rows): &Self::Batch,
        _: Pass,
    ) -> Output<B> {
        let (weight, bias) = (block.weight.val(), block.bias.val().unsqueeze::<2>());
        match input {
            None => {
                let x = Tensor::<B, 2>::from_data(
                    TensorData::new(points.clone(), [*rows, WIDTH]),
                    &weight.device(),
                );
                let hidden = activation::tanh(x.matmul(weight.clone()) + bias);
                Output::Next(Carry::default().with(hidden).with(weight))
            }
            Some(carry) => {
                let shared = carry.get::<2>(1).transpose();
                let y = carry.get::<2>(0).matmul(weight + shared) + bias;
                Output::Loss(y.powi_scalar(2).mean())
            }
        }
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }
}

fn plan(micro: u32, sum: Sum) -> Plan {
    Plan {
        name: "toy".into(),
        seed: 5,
        model: plan::Table::new(),
        data: plan::Table::new(),
        batch: Batch { size: 12, micro },
        optimizer: AdamW {
            lr: 0.01,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: Some(1.0),
            schedule: Schedule::Constant { warmup: 2 },
        },
        steps: 5,
        reduce: Reduce { sum, bits: Bits::B32, nonfinite: NonFinite::Stop },
        checkpoint: plan::Checkpoint { to: String::new(), every: 0, keep: 1 },
        elastic: plan::Elastic {
            min_workers: 1,
            max_workers: 9,
            timeout: std::time::Duration::from_secs(60),
        },
    }
}

/// Losses, last mean gradient and final state of a rank.
type Trained = (Vec<f64>, Vec<f32>, State);

fn rank(group: &Group, plan: &Plan, steps: u64, assigned: &[u32]) -> Trained {
    let (space, state) = State::initial(&Toy, plan.seed);
    let mut trainer = Trainer::<Autodiff<Cpu>, Toy>::new(&Toy, plan, space, state, Default::default());
    let losses = (0..steps).map(|_| trainer.step(group, assigned, false).unwrap().loss).collect();
    (losses, trainer.gradient.clone(), trainer.state.clone())
}

fn train(plan: &Plan, world: u32, steps: u64) -> Vec<Trained> {
    let groups = memory::groups(WorldSize::new(world).unwrap(), GroupConfig::default()).unwrap();
    let micro_batches = plan.batch.micro_batches();
    thread::scope(|scope| {
        let start = |(index, group): (usize, Group)| {
            let assigned: Vec<u32> = (0..micro_batches).filter(|m| m % world == index as u32).collect();
            scope.spawn(move || rank(&group, plan, steps, &assigned))
        };
        let ranks: Vec<_> = groups.into_iter().enumerate().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn any_world_size_and_both_accumulators_give_the_same_state() {
    for bits in Bits::ALL {
        let plan = |sum| {
            let mut plan = plan(2, sum);
            plan.reduce.bits = bits;
            plan
        };
        let reference = train(&plan(Sum::Exact64), 1, 5).remove(0);
        for sum in [Sum::Exact, Sum::Exact64] {
            for world in [1, 2, 3, 5, 7] {
                for (losses, _, state) in train(&plan(sum), world, 5) {
                    assert_eq!(losses, reference.0, "{sum:?} in {bits:?} on {world}");
                    assert!(state == reference.2, "{sum:?} in {bits:?} on {world}");
                }
            }
        }
    }
}

#[test]
fn the_exact_sum_is_the_gradient_of_one_big_batch() {
    let (_, exact, _) = train(&plan(1, Sum::Exact), 3, 1).remove(0);
    let (_, whole, _) = train(&plan(12, Sum::F32), 1, 1).remove(0);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut exact.iter().zip(&whole).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut whole.iter().map(|value| f64::from(*value)));
    assert!(size > 0.0);
    assert!(difference / size < 1e-5, "relative error {}", difference / size);
}

#[test]
fn the_loss_falls() {
    let (losses, _, _) = train(&plan(2, Sum::Exact), 2, 5).remove(0);
    assert!(losses[4] < losses[0], "{losses:?}");
}
