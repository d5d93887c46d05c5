//! The trainer in one process: ranks as threads over in-memory links.

mod sharded;

use std::sync::Barrier;
use std::thread;

use burn::backend::Autodiff;
use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, activation};
use mattock_collectives::{Group, GroupConfig, Rank, WorldSize, memory};
use mattock_data::keys::Stream;
use mattock_exact::Exponents;
use mattock_kernels::{Cpu, Kernels};

use super::{StepError, Trainer};
use crate::beginning::Beginning;
use crate::commit::CommitError;
use crate::gate::{Gate, Recalled};
use crate::origin::Origin;
use crate::params::Space;
use crate::plan::{self, AdamW, Batch, Bits, NonFinite, Plan, Reduce, Schedule, Sum};
use crate::state::State;
use crate::task::{Carry, Facts, Output, Pass, Source, Task, TaskError};

/// Such that a block has two chunks.
const WIDTH: usize = 71;

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

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> impl Iterator<Item = ToyBlock<B>> {
        let mut stream = Stream::new(seed);
        let mut draw = |count| (0..count).map(|_| (stream.uniform() - 0.5) as f32).collect::<Vec<f32>>();
        let mut block = || ToyBlock {
            weight: Param::from_data(TensorData::new(draw(WIDTH * WIDTH), [WIDTH, WIDTH]), device),
            bias: Param::from_data(TensorData::new(draw(WIDTH), [WIDTH]), device),
        };
        [block(), block()].into_iter()
    }

    fn prefix(&self, index: usize) -> String {
        format!("layer.{index}")
    }

    fn samples(&self) -> u64 {
        1000
    }

    fn batch(&self, samples: &[u64]) -> Result<Self::Batch, TaskError> {
        let row = |&sample: &u64| {
            let mut stream = Stream::new(sample);
            (0..WIDTH).map(move |_| stream.uniform() as f32).collect::<Vec<f32>>()
        };
        Ok((samples.iter().flat_map(row).collect(), samples.len()))
    }

    fn held_out(&self, size: usize) -> Result<Vec<(usize, Self::Batch)>, TaskError> {
        let samples: Vec<u64> = (2000..2000 + 3 * size as u64 + 1).collect();
        samples.chunks(size).map(|samples| Ok((samples.len(), self.batch(samples)?))).collect()
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
        recompute: false,
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
        reduce: Reduce { sum, bits: Bits::B32, auto: false, nonfinite: NonFinite::Stop },
        parallel: plan::Parallel { shard: plan::Shard::None, buddies: true },
        checkpoint: plan::Checkpoint {
            to: String::new(),
            every: 0,
            keep: 1,
            keep_every: 0,
            memory: 64 << 20,
        },
        elastic: plan::Elastic {
            min_workers: 1,
            max_workers: 9,
            timeout: std::time::Duration::from_secs(60),
            audit: 0,
        },
    }
}

/// Losses, last mean gradient and final state of a rank.
type Trained = (Vec<f64>, Vec<f32>, State);

fn trainer(plan: &Plan) -> Trainer<'_, Autodiff<Cpu>, Toy> {
    let space = Space::of_task(&Toy);
    let beginning = match plan.parallel.shard {
        plan::Shard::None => Beginning::Whole(State::initial(&Toy, &space, plan.seed).unwrap()),
        plan::Shard::Optimizer | plan::Shard::Full => {
            let origin = Origin::Initial { seed: plan.seed };
            Beginning::At { step: 0, exponents: Exponents::default(), origin }
        }
    };
    Trainer::new(&Toy, plan, space, beginning, Default::default())
}

fn rank(group: &Group, plan: &Plan, steps: u64, assigned: &[u32]) -> Trained {
    let (mut trainer, gate) = (trainer(plan), Gate::default());
    let losses = (0..steps).map(|_| trainer.step(group, assigned, &gate, false).unwrap().loss).collect();
    (losses, trainer.gradient().to_vec(), trainer.state.clone())
}

fn groups(world: u32) -> Vec<Group> {
    memory::groups(WorldSize::new(world).unwrap(), GroupConfig::default()).unwrap()
}

fn train(plan: &Plan, world: u32, steps: u64) -> Vec<Trained> {
    let groups = groups(world);
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
fn what_is_computed_again_has_the_same_bits() {
    let reference = train(&plan(2, Sum::Exact), 1, 5).remove(0);
    let again = Plan { recompute: true, ..plan(2, Sum::Exact) };
    for world in [1, 3] {
        assert!(train(&again, world, 5).remove(0) == reference, "on {world}");
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

/// What each of three ranks computes while all are there, and what two do of a step that the third broke off.
const SHARES: [[u32; 2]; 3] = [[0, 1], [2, 3], [4, 5]];
const RESUMED: [[u32; 3]; 2] = [[0, 1, 5], [2, 3, 4]];

/// A rank that goes from a ring of three to one of two in the middle of its step `breaks`; the last one breaks off, once
/// all `have` the step before: a total that does not reach everybody is another matter.
fn survive(
    plan: &Plan,
    rank: usize,
    (three, two): (Group, Option<Group>),
    breaks: u64,
    have: &Barrier,
) -> Option<State> {
    let (mut trainer, gate) = (trainer(plan), Gate::default());
    gate.open(1, 0, trainer.resume(&SHARES[rank])).unwrap();
    for _ in 1..breaks {
        trainer.step(&three, &SHARES[rank], &gate, false).unwrap();
        gate.reported();
    }
    have.wait();
    let Some(two) = two else {
        three.cancel("killed");
        return None;
    };
    let error = trainer.step(&three, &SHARES[rank], &gate, false).unwrap_err();
    assert!(matches!(error, StepError::Collective(_)), "{error}");
    let held = gate.freeze(1);
    assert_eq!((held.step, held.running), (Some(breaks - 1), None));
    let kept = trainer.resume(&RESUMED[rank]);
    assert_eq!(kept, held.done);
    gate.open(2, breaks - 1, kept).unwrap();
    for _ in breaks..=5 {
        trainer.step(&two, &RESUMED[rank], &gate, false).unwrap();
        gate.reported();
    }
    Some(trainer.state.clone())
}

/// What a rank tells of the micro-batch that ranks differ in, and the state that it has then: in the third step rank 1 computes
/// wrongly.
fn audited(group: &Group, plan: &Plan) -> (Option<u64>, State) {
    let (mut trainer, gate) = (trainer(plan), Gate::default());
    let rank = group.ring().rank().0 as usize;
    gate.open(1, 0, []).unwrap();
    trainer.audit_shares(SHARES.map(|share| share.to_vec()).to_vec());
    for _ in 0..2 {
        trainer.step(group, &SHARES[rank], &gate, false).unwrap();
        gate.reported();
    }
    trainer.wrong = rank == 1;
    let error = trainer.step(group, &SHARES[rank], &gate, false).unwrap_err();
    assert!(matches!(error, StepError::Audit { step: 3, index: 0, owner: 0, auditor: 1 }), "{error}");
    (gate.freeze(1).audit, trainer.state.clone())
}

#[test]
fn an_audit_finds_who_computes_wrongly_before_anything_is_written() {
    let mut plan = plan(2, Sum::Exact);
    plan.elastic.audit = 1_000_000;
    let (_, _, reference) = train(&plan, 1, 2).remove(0);
    let told: Vec<(Option<u64>, State)> = thread::scope(|scope| {
        let start = |group: Group| {
            scope.spawn({
                let plan = &plan;
                move || audited(&group, plan)
            })
        };
        let ranks: Vec<_> = groups(3).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(told.iter().all(|(hash, state)| hash.is_some() && *state == reference));
    assert!(told[0].0 == told[2].0 && told[0].0 != told[1].0, "two agree, and rank 1 differs");
}

#[test]
fn so_many_micro_batches_are_audited_as_were_asked_for() {
    let mut plan = plan(2, Sum::Exact);
    plan.elastic.audit = 100_000;
    let mut trainer = trainer(&plan);
    let mut audited = 0;
    for step in 0..1000 {
        trainer.state.step = step;
        audited += (0..6).filter(|&index| trainer.is_audited(index)).count();
    }
    assert!((540..660).contains(&audited), "{audited} of 6000");
}

#[test]
fn a_rank_that_breaks_off_leaves_no_trace() {
    for sum in [Sum::Exact, Sum::Exact64] {
        let plan = plan(2, sum);
        let (_, _, reference) = train(&plan, 1, 5).remove(0);
        for breaks in [1, 2, 4] {
            let (three, two, have) = (groups(3), groups(2), Barrier::new(3));
            let states = thread::scope(|scope| {
                let twos = two.into_iter().map(Some).chain([None]);
                let start = |((rank, three), two): ((usize, Group), Option<Group>)| {
                    let (plan, have) = (&plan, &have);
                    scope.spawn(move || survive(plan, rank, (three, two), breaks, have))
                };
                let ranks: Vec<_> = three.into_iter().enumerate().zip(twos).map(start).collect();
                ranks.into_iter().filter_map(|rank| rank.join().unwrap()).collect::<Vec<State>>()
            });
            assert_eq!(states.len(), 2);
            states.iter().for_each(|state| assert!(*state == reference, "{sum:?}, broken in step {breaks}"));
        }
    }
}

#[test]
fn what_is_added_up_of_another_share_is_forgotten() {
    let plan = plan(2, Sum::Exact);
    let (mut trainer, gate) = (trainer(&plan), Gate::default());
    let [alone] = &groups(1)[..] else { panic!("one rank") };
    assert!(
        matches!(trainer.step(alone, &[0, 1], &gate, false), Err(StepError::Commit(_))),
        "four are missing"
    );
    assert_eq!(trainer.resume(&[0, 1, 2]), [0, 1]);
    assert_eq!(trainer.resume(&[1, 2]), [0u32; 0]);
    trainer.step(alone, &[0, 1, 2, 3, 4, 5], &gate, false).unwrap();
    assert!(trainer.state == train(&plan, 1, 1).remove(0).2);
}

#[test]
fn nothing_is_written_once_a_ring_is_recalled() {
    let plan = plan(2, Sum::Exact);
    let (mut trainer, gate) = (trainer(&plan), Gate::default());
    let [alone] = &groups(1)[..] else { panic!("one rank") };
    let all = [0, 1, 2, 3, 4, 5];
    gate.open(1, 0, []).unwrap();
    gate.freeze(1);
    let before = trainer.state.clone();
    assert!(matches!(trainer.step(alone, &all, &gate, false), Err(StepError::Recalled(Recalled))));
    assert!(trainer.state == before && trainer.counted.is_empty());
}

#[test]
fn a_rank_without_the_state_gets_it() {
    let plan = plan(2, Sum::Exact);
    let (_, _, reference) = train(&plan, 1, 5).remove(0);
    // A state before the first step has no exponents; one after it has.
    for before in [0, 3] {
        let (alone, pair) = (groups(1).remove(0), groups(2));
        thread::scope(|scope| {
            let start = |(rank, group): (usize, Group)| {
                let (plan, alone, reference) = (&plan, &alone, &reference);
                scope.spawn(move || {
                    let (mut trainer, gate) = (trainer(plan), Gate::default());
                    let knows = rank == 1;
                    for _ in 0..if knows { before } else { 0 } {
                        trainer.step(alone, &[0, 1, 2, 3, 4, 5], &gate, false).unwrap();
                    }
                    // Whatever it held before.
                    if !knows {
                        trainer.state.arrays_mut()[0].fill(f32::NAN);
                    }
                    trainer.receive_state(&group, Rank(1), before, !knows).unwrap();
                    for _ in before..5 {
                        let share = if knows { [1, 2, 4] } else { [0, 3, 5] };
                        trainer.step(&group, &share, &gate, false).unwrap();
                    }
                    assert!(trainer.state == *reference, "rank {rank}, from step {before}");
                })
            };
            let ranks: Vec<_> = pair.into_iter().enumerate().map(start).collect();
            ranks.into_iter().for_each(|rank| rank.join().unwrap());
        });
    }
}

#[test]
fn ranks_that_start_from_different_states_write_nothing() {
    let plan = plan(2, Sum::Exact);
    thread::scope(|scope| {
        let start = |(rank, group): (usize, Group)| {
            let plan = &plan;
            scope.spawn(move || {
                let (mut trainer, gate) = (trainer(plan), Gate::default());
                if rank == 1 {
                    let mut state = trainer.state.clone();
                    state.arrays_mut()[2][5] = f32::from_bits(state.second[5].to_bits() ^ 1);
                    trainer.replace(Beginning::Whole(state));
                }
                let before = trainer.state.clone();
                let error = trainer.step(&group, &SHARES[rank], &gate, false).unwrap_err();
                assert!(matches!(error, StepError::Commit(CommitError::OtherState { .. })), "{error}");
                assert!(trainer.state == before);
            })
        };
        let ranks: Vec<_> = groups(3).into_iter().enumerate().map(start).collect();
        ranks.into_iter().for_each(|rank| rank.join().unwrap());
    });
}
