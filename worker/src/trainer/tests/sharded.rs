//! Sharded state in one process: the same bits on any number of ranks, through losses and joins.

use super::*;
use crate::estimate::Estimate;
use crate::evaluate::held_out;
use crate::plan::{Parallel, Shard};
use crate::task::Outline;

const ALL: [u32; 6] = [0, 1, 2, 3, 4, 5];

const SHARDS: [Shard; 2] = [Shard::Optimizer, Shard::Full];

fn sharded(shard: Shard, buddies: bool) -> Plan {
    Plan { parallel: Parallel { shard, buddies }, ..plan(2, Sum::Exact) }
}

fn share(rank: usize, world: usize) -> Vec<u32> {
    ALL.into_iter().filter(|index| *index as usize % world == rank).collect()
}

type Toys<'a> = Trainer<'a, Autodiff<Cpu>, Toy>;

/// One rank of a ring: its trainer, if it has one already, and whether that has a state.
type Member<'a> = Option<Toys<'a>>;

/// Brings these together in a ring, lets each do something there, and gives the trainers back.
fn ring<'a, R: Send>(
    plan: &'a Plan,
    members: Vec<Member<'a>>,
    act: impl Fn(usize, &Group, &mut Toys<'a>, bool) -> R + Sync,
) -> Vec<(Toys<'a>, R)> {
    let world = members.len() as u32;
    thread::scope(|scope| {
        let start = |((rank, group), member): ((usize, Group), Member<'a>)| {
            let act = &act;
            scope.spawn(move || {
                let has_state = member.is_some();
                let mut trainer = member.unwrap_or_else(|| {
                    let space = Space::of_task(&Toy);
                    Trainer::new(&Toy, plan, space, Beginning::Nothing, Default::default())
                });
                let done = act(rank, &group, &mut trainer, has_state);
                (trainer, done)
            })
        };
        let ranks: Vec<_> = groups(world).into_iter().enumerate().zip(members).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Trains in a ring from one step to another.
fn train_on<'a>(plan: &'a Plan, members: Vec<Member<'a>>, from: u64, to: u64) -> Vec<Toys<'a>> {
    let world = members.len();
    let act = |rank: usize, group: &Group, trainer: &mut Toys<'a>, has_state: bool| {
        let gate = Gate::default();
        trainer.regroup(group, from, has_state, &gate).unwrap();
        trainer.resume(&share(rank, world));
        for _ in from..to {
            trainer.step(group, &share(rank, world), &gate, false).unwrap();
        }
    };
    ring(plan, members, act).into_iter().map(|(trainer, ())| trainer).collect()
}

/// The whole state of the ring that these are.
fn whole<'a>(plan: &'a Plan, members: Vec<Toys<'a>>) -> (State, u64) {
    let members = members.into_iter().map(Some).collect();
    let act = |rank: usize, group: &Group, trainer: &mut Toys<'a>, _: bool| {
        let hash = trainer.state_hash(group).unwrap();
        (trainer.whole_state(group, rank == 0).unwrap(), hash)
    };
    let mut states = ring(plan, members, act);
    let (_, (state, hash)) = states.swap_remove(0);
    (state.unwrap(), hash)
}

fn reference(plan: &Plan, steps: u64) -> State {
    let whole = Plan { parallel: Parallel { shard: Shard::None, buddies: false }, ..plan.clone() };
    train(&whole, 1, steps).remove(0).2
}

fn fresh(plan: &Plan, world: usize) -> Vec<Member<'_>> {
    (0..world).map(|_| Some(trainer(plan))).collect()
}

#[test]
fn sharding_leaves_no_trace() {
    for sum in [Sum::Exact, Sum::Exact64] {
        for bits in [Bits::B32, Bits::B24, Bits::B12] {
            for (shard, buddies) in SHARDS.into_iter().flat_map(|shard| [(shard, false), (shard, true)]) {
                let mut plan = sharded(shard, buddies);
                (plan.reduce.sum, plan.reduce.bits) = (sum, bits);
                let reference = reference(&plan, 4);
                for world in [1, 2, 3, 5] {
                    let members = train_on(&plan, fresh(&plan, world), 0, 4);
                    let held: usize = members.iter().map(|trainer| trainer.state.first.len()).sum();
                    assert_eq!(held, reference.first.len(), "each moment is held once beside the copies");
                    let (state, hash) = whole(&plan, members);
                    assert!(
                        state == reference,
                        "{shard:?} of {sum:?} in {bits:?} on {world}, buddies: {buddies}"
                    );
                    assert_eq!(hash, reference.hash());
                }
            }
        }
    }
}

#[test]
fn held_out_loss_is_that_of_one_who_has_all() {
    let plan = sharded(Shard::Full, true);
    let (reference, device) = (reference(&plan, 2), Default::default());
    let space = Space::of_task(&Toy);
    let loss = held_out::<Cpu, Toy>(&Toy, &plan, &space, &reference.parameters, &device).unwrap().unwrap();
    for world in [1, 2, 3, 5] {
        let members = train_on(&plan, fresh(&plan, world), 0, 2).into_iter().map(Some).collect();
        let act = |_: usize, group: &Group, trainer: &mut Toys<'_>, _: bool| {
            trainer.rest();
            trainer.held_out(group, &Gate::default()).unwrap()
        };
        for (_, told) in ring(&plan, members, act) {
            assert_eq!(told, Some(loss), "on {world}");
        }
    }
}

/// These, and one more who has nothing, in a ring that does no step.
fn one_more<'a>(plan: &'a Plan, members: Vec<Toys<'a>>, step: u64) -> Vec<Toys<'a>> {
    train_on(plan, members.into_iter().map(Some).chain([None]).collect(), step, step)
}

/// Rings that break before they commit anything leave everybody what it had, as well as what it has got.
#[test]
fn what_was_held_at_the_last_commit_is_kept_until_the_next() {
    let again = |plan: &Plan, mut members: Vec<Toys<'_>>, lost: &[usize], step: u64| {
        lost.iter().rev().for_each(|&lost| drop(members.remove(lost)));
        let members = members.into_iter().map(Some).chain([None]).collect();
        let (state, _) = whole(plan, train_on(plan, members, step, 4));
        assert!(state == reference(plan, 4), "{:?}", plan.parallel);
    };
    for shard in SHARDS {
        let plan = sharded(shard, true);
        let members = || train_on(&plan, fresh(&plan, 3), 0, 2);
        // Two neighbours of the new ring, one of the old.
        again(&plan, one_more(&plan, members(), 2), &[2, 3], 2);
        again(&plan, one_more(&plan, one_more(&plan, members(), 2), 2), &[2, 3, 4], 2);
        // Where the state lay at the start, it lies until the first step is done.
        let plan = sharded(shard, false);
        again(&plan, train_on(&plan, fresh(&plan, 3), 0, 0), &[1], 0);
    }
}

#[test]
fn after_a_commit_nobody_keeps_what_is_another_rank_s() {
    for shard in SHARDS {
        let plan = sharded(shard, true);
        let members = train_on(&plan, fresh(&plan, 3), 0, 2).into_iter().map(Some).chain([None]).collect();
        let members = train_on(&plan, members, 2, 3);
        let kept = members.iter().filter(|trainer| trainer.former_place().is_some()).count();
        assert_eq!(kept, 0);
        let members = members.into_iter().map(Some).collect();
        let act = |_: usize, group: &Group, trainer: &mut Toys<'_>, _: bool| {
            let before = trainer.place();
            trainer.regroup(group, 3, true, &Gate::default()).unwrap();
            (before == trainer.place(), trainer.former_place())
        };
        let rested = ring(&plan, members, act).into_iter().all(|(_, told)| told == (true, None));
        assert!(rested, "nothing moved, so nothing is kept");
    }
}

/// A rank that has contributed to a commit, and then gets an older state, does not write that contribution over it.
#[test]
fn a_contribution_ends_with_its_state() {
    let plan = sharded(Shard::Optimizer, false);
    let members = train_on(&plan, fresh(&plan, 2), 0, 1).into_iter().map(Some).collect();
    let act = |rank: usize, group: &Group, trainer: &mut Toys<'_>, _: bool| {
        trainer.contribute(group, &share(rank, 2), &Gate::default(), false).unwrap();
    };
    let mut members: Vec<Toys<'_>> =
        ring(&plan, members, act).into_iter().map(|(trainer, ())| trainer).collect();
    let beginning = || {
        let origin = Origin::Initial { seed: plan.seed };
        Beginning::At { step: 0, exponents: Exponents::default(), origin }
    };
    members.iter_mut().for_each(|trainer| trainer.replace(beginning()));
    // One does a step alone; the other comes later.
    let late = members.pop();
    let first = train_on(&plan, vec![members.pop()], 0, 1).pop();
    let (state, _) = whole(&plan, train_on(&plan, vec![first, late], 1, 2));
    assert!(state == reference(&plan, 2));
}

#[test]
fn what_is_being_written_to_storage_stays_as_it_was() {
    for shard in SHARDS {
        let plan = sharded(shard, true);
        let members = train_on(&plan, fresh(&plan, 3), 0, 2).into_iter().map(Some).collect();
        let act = |rank: usize, group: &Group, trainer: &mut Toys<'_>, _: bool| {
            let before = trainer.state.clone();
            let copies = before.arrays().map(<[f32]>::to_vec);
            let part = trainer.part(group, &[]).unwrap();
            let (loan, back) = trainer.lend();
            thread::scope(|scope| {
                // Somebody reads until then.
                scope.spawn(move || drop((loan, back)));
                trainer.step(group, &share(rank, 3), &Gate::default(), false).unwrap();
            });
            assert!(*part.moments.1[0] == copies[1] && *part.moments.1[1] == copies[2]);
            assert!(
                trainer.state.first != before.first && before.arrays() == copies.each_ref().map(|a| &a[..])
            );
        };
        let members = ring(&plan, members, act).into_iter().map(|(trainer, ())| Some(trainer)).collect();
        let (state, _) = whole(&plan, train_on(&plan, members, 3, 4));
        assert!(state == reference(&plan, 4), "{shard:?}");
    }
}

#[test]
fn ranks_that_come_and_go_leave_no_trace() {
    for shard in SHARDS {
        come_and_go(&sharded(shard, true));
    }
}

fn come_and_go(plan: &Plan) {
    let reference = reference(plan, 5);
    // Ranks that are there in each step, by the number that they keep; those lost at once are no neighbours.
    let rings: [[&[usize]; 5]; 3] = [
        [&[0, 1, 2], &[0, 2], &[2], &[2, 3, 4, 5], &[3, 5]],
        [&[0], &[0, 1], &[1], &[1, 2, 3], &[1, 2, 3, 4]],
        [&[0, 1, 2, 3, 4], &[0, 2, 4], &[5, 0, 2, 4], &[4, 5, 0], &[0, 4]],
    ];
    for rings in rings {
        let mut living: Vec<(usize, Toys<'_>)> = rings[0].iter().map(|&name| (name, trainer(plan))).collect();
        for (step, names) in (0..).zip(rings) {
            let mut member = |name: &usize| {
                let at = living.iter().position(|(other, _)| other == name)?;
                Some(living.swap_remove(at).1)
            };
            let members: Vec<Member<'_>> = names.iter().map(&mut member).collect();
            let trained = train_on(plan, members, step, step + 1);
            living = names.iter().copied().zip(trained).collect();
        }
        let (state, hash) = whole(plan, living.into_iter().map(|(_, trainer)| trainer).collect());
        assert!(state == reference, "{rings:?}");
        assert_eq!(hash, reference.hash());
    }
}

#[test]
fn what_its_only_holder_took_with_it_is_missed_by_all() {
    for (shard, buddies, gone) in [
        (Shard::Optimizer, false, vec![1]),
        (Shard::Optimizer, true, vec![1, 2]),
        (Shard::Full, true, vec![0, 1]),
    ] {
        let plan = sharded(shard, buddies);
        let mut members = train_on(&plan, fresh(&plan, 4), 0, 2);
        gone.iter().rev().for_each(|&rank| drop(members.remove(rank)));
        let members = members.into_iter().map(Some).chain([None]).collect();
        let act = |_: usize, group: &Group, trainer: &mut Toys<'_>, has_state: bool| {
            trainer.regroup(group, 2, has_state, &Gate::default())
        };
        for (_, outcome) in ring(&plan, members, act) {
            let error = outcome.unwrap_err();
            assert!(matches!(error, StepError::ShardsLost { step: 2, elements: 1.. }), "{error}");
        }
    }
}

/// Rank 2 dies after all have contributed to the commit, and only rank 0 sees the total.
#[test]
fn who_misses_the_total_writes_the_same_step_later() {
    for shard in SHARDS {
        miss_the_total(&sharded(shard, true));
    }
}

fn miss_the_total(plan: &Plan) {
    let reference = reference(plan, 5);
    let before = train_on(plan, fresh(plan, 3), 0, 2).into_iter().map(Some).collect();
    let act = |rank: usize, group: &Group, trainer: &mut Toys<'_>, _: bool| {
        let gate = Gate::default();
        if rank == 0 {
            trainer.step(group, &share(0, 3), &gate, false).unwrap();
        } else {
            trainer.contribute(group, &share(rank, 3), &gate, false).unwrap();
        }
    };
    let mut members: Vec<Toys<'_>> =
        ring(plan, before, act).into_iter().map(|(trainer, ())| trainer).collect();
    drop(members.pop());
    assert_eq!((members[0].state.step, members[1].state.step), (3, 2));
    let members = train_on(plan, members.into_iter().map(Some).chain([None]).collect(), 3, 5);
    let (state, hash) = whole(plan, members);
    assert!(state == reference);
    assert_eq!(hash, reference.hash());
}

#[test]
fn holders_of_a_shard_that_differ_write_nothing() {
    let plan = sharded(Shard::Optimizer, true);
    let members = train_on(&plan, fresh(&plan, 3), 0, 2).into_iter().map(Some).collect();
    let act = |rank: usize, group: &Group, trainer: &mut Toys<'_>, _: bool| {
        if let (1, Some(copy)) = (rank, trainer.sharding.as_mut().and_then(|sharding| sharding.copy.as_mut()))
        {
            copy.state.arrays_mut()[2][5] = f32::from_bits(copy.state.second[5].to_bits() ^ 1);
            copy.hash = copy.state.part_hash(&copy.held);
        }
        let before = trainer.state.clone();
        let error = trainer.step(group, &share(rank, 3), &Gate::default(), false).unwrap_err();
        assert!(matches!(error, StepError::Commit(CommitError::OtherShard { rank: 0, .. })), "{error}");
        assert!(trainer.state == before);
    };
    ring(&plan, members, act);
}

/// What a rank has of parameters, moments, a copy of another's shard, gradients, and sums that become one, in bytes.
fn held(trainer: &Toys<'_>) -> [u64; 6] {
    let copy = trainer.sharding.as_ref().and_then(|sharding| sharding.copy.as_ref());
    let bytes = |array: &[f32]| size_of_val(array) as u64;
    let State { parameters, first, second, .. } = &trainer.state;
    let copied = |copy: &super::super::sharding::Copied| copy.state.arrays().map(bytes);
    [
        bytes(parameters),
        bytes(first) + bytes(second),
        copy.map_or(0, |copy| copied(copy).iter().sum()),
        bytes(&trainer.gradient),
        copy.map_or(0, |copy| bytes(&copy.gradient)),
        trainer.sum.decoded().map_or(0, bytes),
    ]
}

#[test]
fn an_estimate_says_what_a_trainer_holds() {
    const LINES: [&str; 6] = [
        "own parameters",
        "own first and second moments",
        "copy of another worker's shard",
        "own gradient, decoded",
        "another worker's gradient",
        "own sums",
    ];
    for shard in [Shard::None, Shard::Optimizer, Shard::Full] {
        for (buddies, world) in [(false, 1), (false, 3), (true, 1), (true, 2), (true, 3), (true, 5)] {
            let plan = sharded(shard, buddies);
            let members = match shard {
                Shard::None => vec![trainer(&plan)],
                Shard::Optimizer | Shard::Full => train_on(&plan, fresh(&plan, world), 0, 1),
            };
            let space = members[0].space.clone();
            let outline = Outline { space, tokens_per_sample: 1, activations: None };
            let estimate = Estimate::new(&outline, &plan, world as u32);
            let line = |what: &str| {
                let lines = estimate.memory.iter().filter(|line| line.what == what);
                lines.map(|line| line.bytes).sum::<u64>()
            };
            let (told, held) = (LINES.map(line), members.iter().map(held).collect::<Vec<_>>());
            // The estimate is that of the fullest rank.
            let most = held.iter().max_by_key(|held| held.iter().sum::<u64>()).unwrap();
            let what = format!("{shard:?} on {world}, buddies: {buddies}: {told:?} of {held:?}");
            assert!(held.contains(&told), "{what}");
            assert_eq!(told.iter().sum::<u64>(), most.iter().sum::<u64>(), "{what}");
        }
    }
}
