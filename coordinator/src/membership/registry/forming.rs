//! The next ring: from which step it starts, who gives its state to whom, and who computes what.
//!
//! It starts from the newest state that anybody has. Whoever has an older one, or none, gets it from the first that has it,
//! and what it computed of an older step counts for nothing. What the others have computed of the next step stays theirs.

use std::collections::BTreeSet;

use super::{Registry, Standing};
use crate::ids::WorkerId;
use crate::membership::assign::{assigned, resumed};
use crate::membership::vocabulary::{Action, Outcome, Phase};
use crate::protocol::{Formation, Holding, Place};

impl Registry {
    pub(super) fn form(&mut self, free: &[WorkerId], actions: &mut Vec<Action>) {
        let holdings: Vec<Holding> = free.iter().filter_map(|id| self.workers[id].held()).cloned().collect();
        let Some(step) = holdings.iter().filter_map(|holding| holding.step).max() else {
            return self.restore(free, actions);
        };
        // Where another had the run before, some may come from its rings, and others be new.
        let first = self.formation.is_none() && !self.successor;
        if first && holdings.iter().any(|holding| holding.step != Some(step)) {
            let steps: BTreeSet<Option<u64>> = holdings.iter().map(|holding| holding.step).collect();
            let reason = format!(
                "workers start from different steps {steps:?}: another run writes the same checkpoints"
            );
            return self.end(Outcome::Failed, &reason, actions);
        }
        self.generation += 1;
        (self.abandoned, self.replacement) = (None, None);
        self.restoring.clear();
        let formation = self.formation_of(free, &holdings, step);
        for id in free {
            self.workers.entry(*id).and_modify(|worker| worker.standing = Standing::Member);
        }
        self.linked.clear();
        self.stale = None;
        self.phase = Phase::Forming;
        self.formation = Some(formation.clone());
        actions.push(Action::Form(formation));
    }

    fn formation_of(&self, free: &[WorkerId], holdings: &[Holding], step: u64) -> Formation {
        let ranks = free.len() as u32;
        let nothing = Holding::default();
        let up_to_date = |holding: &Holding| holding.step == Some(step);
        // What was computed of an older step counts for nothing.
        let of_this_step: Vec<&Holding> =
            holdings.iter().map(|holding| if up_to_date(holding) { holding } else { &nothing }).collect();
        let steady = |rank| assigned(self.config.micro_batches, ranks, rank).collect::<Vec<u32>>();
        let untouched =
            of_this_step.iter().all(|holding| holding.done.is_empty() && holding.running.is_none());
        let shares = match untouched {
            true => (0..ranks).map(steady).collect(),
            false => resumed(self.config.micro_batches, &of_this_step),
        };
        let places = (0..).zip(free).zip(shares);
        let place = |((rank, id), first): ((u32, &WorkerId), Vec<u32>)| Place {
            worker: *id,
            address: self.workers[id].candidate.address.clone(),
            micro_batches: steady(rank),
            first,
        };
        let source = holdings.iter().position(up_to_date).map(|rank| rank as u32);
        let behind = holdings.iter().any(|holding| !up_to_date(holding));
        Formation {
            generation: self.generation,
            step,
            source: source.filter(|_| behind),
            places: places.map(place).collect(),
        }
    }

    /// Whoever had the state is gone: those who are there load it from storage.
    fn restore(&mut self, free: &[WorkerId], actions: &mut Vec<Action>) {
        for id in free {
            self.workers.entry(*id).and_modify(|worker| worker.standing = Standing::Loading);
        }
        if self.config.divided {
            self.restoring = free.iter().copied().collect();
        }
        actions.push(Action::Restore(free.to_vec()));
    }
}
