//! Who holds another state than the rest of its ring: the majority is right, and who differs goes.
//!
//! A rank's memory or processor may do something wrong without a word. All ranks of a ring have the same state, so whose
//! differs from that of more than half of them is wrong. It is given up as if it were lost, with all that it holds: the
//! others keep what they have, and what it had computed of the step is computed again.
//!
//! Ranks vote with what they say when a ring is recalled, for whatever reason that is: a commit that finds different states,
//! or a ledger that does, only ends the ring. Where state is divided among them, they vote on what all of them gather.
//!
//! # Invariants
//! 1. More than half of the last ring must agree; who is gone agrees with nobody.
//! 2. No ring is formed with one whose state is known to differ, nor where nobody can say who is right.

use std::collections::BTreeMap;

use super::Registry;
use crate::ids::WorkerId;
use crate::membership::vocabulary::{Action, Dissent};
use crate::protocol::Holding;

/// Of what ranks tell hashes, and how it is called.
type Hashed = (&'static str, fn(&Holding) -> Option<u64>);

const STATE: &str = "state";
const HASHED: [Hashed; 3] = [
    (STATE, |holding| holding.state_hash),
    ("parameters", |holding| holding.basis),
    ("gradient", |holding| holding.audit),
];

/// What the hashes of a ring's ranks say.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All that were told are the same.
    Agreed,
    /// So many have this one; others differ.
    Majority(u64, usize),
    /// Nobody can say who is right.
    Split,
}

fn verdict(ranks: usize, told: impl Iterator<Item = u64>) -> Verdict {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    told.for_each(|hash| *counts.entry(hash).or_default() += 1);
    if counts.len() <= 1 {
        return Verdict::Agreed;
    }
    let majority = counts.into_iter().find(|(_, count)| 2 * count > ranks);
    majority.map_or(Verdict::Split, |(hash, count)| Verdict::Majority(hash, count))
}

impl Registry {
    /// Gives up members of the last ring whose state is not that of the majority.
    ///
    /// # Errors
    /// Where they differ, and there is no majority: why the run cannot go on.
    pub(super) fn judge(&mut self, actions: &mut Vec<Action>) -> Result<(), String> {
        for (what, hash_of) in HASHED {
            let (ranks, step, told) = self.told(hash_of);
            let hashes = told.iter().filter_map(|(_, hash)| *hash);
            match verdict(ranks, hashes) {
                Verdict::Agreed => {}
                Verdict::Majority(want, agreed) => {
                    let odd = told.into_iter().filter_map(|(id, hash)| Some((id, hash?)));
                    for (id, got) in odd.filter(|(_, hash)| *hash != want) {
                        let dissent = Dissent { step, what, got, want, agreed, ranks };
                        let cause = dissent.to_string();
                        actions.push(Action::Quarantine(id, dissent));
                        self.lose(id, &cause, actions);
                    }
                }
                // Who has not begun to compute cannot say. The next commit asks again, and nothing is written before.
                Verdict::Split if what != STATE && told.iter().any(|(_, hash)| hash.is_none()) => {}
                Verdict::Split => return Err(split(what, step, &told)),
            }
        }
        Ok(())
    }

    /// The size of the last ring, the newest step that its members hold, and what those who do tell of it.
    fn told(&self, hash_of: fn(&Holding) -> Option<u64>) -> (usize, u64, Vec<(WorkerId, Option<u64>)>) {
        let places = self.formation.iter().flat_map(|ring| &ring.places);
        let held = |id: WorkerId| Some((id, self.workers.get(&id)?.held()?));
        let held: Vec<(WorkerId, &Holding)> = places.clone().filter_map(|place| held(place.worker)).collect();
        let newest = held.iter().filter_map(|(_, holding)| holding.step).max();
        let of_newest = held.iter().filter(|(_, holding)| newest.is_some() && holding.step == newest);
        let told = of_newest.map(|(id, holding)| (*id, hash_of(holding))).collect();
        (places.count(), newest.unwrap_or_default(), told)
    }
}

fn split(what: &str, step: u64, told: &[(WorkerId, Option<u64>)]) -> String {
    let of = |(id, hash): &(WorkerId, Option<u64>)| hash.map(|hash| format!("{id} has {hash:016x}"));
    let all: Vec<String> = told.iter().filter_map(of).collect();
    format!(
        "workers have different {what} after step {step}, and no majority says who is right ({}): one's memory or processor \
         did something wrong; nothing was written since; resume from the newest checkpoint",
        all.join(", ")
    )
}
