//! The worker's half: which of the coordinator's messages mean something now.
//!
//! Messages of older generations, and those that come twice, mean nothing.

use crate::ids::WorkerId;
use crate::protocol::{Formation, FromCoordinator};

/// What a worker does about a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    /// Drop the ring there was, and link up as this rank of the formation; then report.
    Link {
        /// Own rank.
        rank: u32,
        /// The ring.
        formation: Formation,
    },
    /// Drop this ring, and say what is held.
    Recall {
        /// The ring's.
        generation: u64,
        /// Why.
        reason: String,
    },
    /// Load the run's state from storage, and be ready.
    Restore {
        /// The newest step that counts.
        up_to: u64,
    },
    /// Train in the ring that was linked.
    Train(Formation),
    /// Ask for a stop at the next commit.
    Stop,
    /// The run goes on without this worker, which was told to leave.
    Leave {
        /// Why.
        reason: String,
    },
    /// The run is over.
    End {
        /// Why.
        reason: String,
    },
}

/// The worker's half of membership.
#[derive(Debug, Clone)]
pub struct Member {
    worker: WorkerId,
    formation: Option<Formation>,
    training: bool,
    recalled: bool,
    ended: bool,
}

impl Member {
    /// A worker that was admitted.
    pub fn new(worker: WorkerId) -> Self {
        Self { worker, formation: None, training: false, recalled: false, ended: false }
    }

    /// The generation of its ring, if it is in one.
    pub fn generation(&self) -> Option<u64> {
        self.formation.as_ref().map(|formation| formation.generation)
    }

    /// Takes in a message; `None` where it means nothing now.
    pub fn receive(&mut self, message: FromCoordinator) -> Option<Instruction> {
        if self.ended {
            return None;
        }
        match message {
            FromCoordinator::Form(formation) => self.form(formation),
            FromCoordinator::Start { generation } => self.start(generation),
            FromCoordinator::Recall { generation, reason } => self.recall(generation, reason),
            FromCoordinator::Restore { up_to } => Some(Instruction::Restore { up_to }),
            FromCoordinator::Released { reason } => {
                self.ended = true;
                Some(Instruction::Leave { reason })
            }
            FromCoordinator::Stop => Some(Instruction::Stop),
            FromCoordinator::End { reason } | FromCoordinator::Refused { reason } => {
                self.ended = true;
                Some(Instruction::End { reason })
            }
            FromCoordinator::Welcome { .. }
            | FromCoordinator::Scaling { .. }
            | FromCoordinator::Heartbeat => None,
        }
    }

    fn form(&mut self, formation: Formation) -> Option<Instruction> {
        if self.generation().is_some_and(|current| formation.generation <= current) {
            return None;
        }
        let rank = formation.places.iter().position(|place| place.worker == self.worker)?;
        self.formation = Some(formation.clone());
        (self.training, self.recalled) = (false, false);
        Some(Instruction::Link { rank: rank as u32, formation })
    }

    fn recall(&mut self, generation: u64, reason: String) -> Option<Instruction> {
        if self.generation() != Some(generation) || std::mem::replace(&mut self.recalled, true) {
            return None;
        }
        Some(Instruction::Recall { generation, reason })
    }

    fn start(&mut self, generation: u64) -> Option<Instruction> {
        if self.recalled {
            return None;
        }
        let formation = self.formation.as_ref().filter(|formation| formation.generation == generation)?;
        if std::mem::replace(&mut self.training, true) {
            return None;
        }
        Some(Instruction::Train(formation.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Place;

    fn form(generation: u64, workers: &[u64]) -> FromCoordinator {
        let place = |&worker: &u64| Place {
            worker: WorkerId(worker),
            address: String::new(),
            micro_batches: Vec::new(),
            first: Vec::new(),
        };
        let places = workers.iter().map(place).collect();
        FromCoordinator::Form(Formation { generation, step: 0, source: None, places })
    }

    fn recall(generation: u64) -> FromCoordinator {
        FromCoordinator::Recall { generation, reason: "it broke".into() }
    }

    #[test]
    fn old_rings_and_repeated_messages_mean_nothing() {
        let mut member = Member::new(WorkerId(7));
        assert!(matches!(member.receive(form(2, &[3, 7])), Some(Instruction::Link { rank: 1, .. })));
        assert_eq!(member.receive(form(2, &[3, 7])), None);
        assert_eq!(member.receive(form(1, &[7])), None);
        assert_eq!(member.receive(FromCoordinator::Start { generation: 1 }), None);
        assert!(matches!(
            member.receive(FromCoordinator::Start { generation: 2 }),
            Some(Instruction::Train(_))
        ));
        assert_eq!(member.receive(FromCoordinator::Start { generation: 2 }), None);
        assert!(matches!(member.receive(form(3, &[7])), Some(Instruction::Link { rank: 0, .. })));
        assert!(matches!(
            member.receive(FromCoordinator::Start { generation: 3 }),
            Some(Instruction::Train(_))
        ));
    }

    #[test]
    fn a_ring_of_others_means_nothing() {
        let mut member = Member::new(WorkerId(7));
        assert_eq!(member.receive(form(1, &[1, 2])), None);
        assert_eq!(member.generation(), None);
    }

    #[test]
    fn a_ring_is_recalled_once_and_then_not_started() {
        let mut member = Member::new(WorkerId(7));
        assert_eq!(member.receive(recall(1)), None, "it is in no ring");
        member.receive(form(2, &[7]));
        assert_eq!(member.receive(recall(1)), None);
        assert_eq!(member.receive(recall(3)), None);
        let instruction = Instruction::Recall { generation: 2, reason: "it broke".into() };
        assert_eq!(member.receive(recall(2)), Some(instruction));
        assert_eq!(member.receive(recall(2)), None);
        assert_eq!(member.receive(FromCoordinator::Start { generation: 2 }), None);
        assert!(matches!(member.receive(form(3, &[7])), Some(Instruction::Link { .. })));
        assert!(matches!(
            member.receive(FromCoordinator::Start { generation: 3 }),
            Some(Instruction::Train(_))
        ));
        assert!(matches!(member.receive(recall(3)), Some(Instruction::Recall { generation: 3, .. })));
    }

    #[test]
    fn who_was_released_is_told_nothing_more() {
        let mut member = Member::new(WorkerId(7));
        let released = FromCoordinator::Released { reason: "told to".into() };
        assert_eq!(member.receive(released), Some(Instruction::Leave { reason: "told to".into() }));
        assert_eq!(member.receive(form(9, &[7])), None);
    }

    #[test]
    fn a_stop_and_a_restore_always_mean_something() {
        let mut member = Member::new(WorkerId(7));
        assert_eq!(member.receive(FromCoordinator::Stop), Some(Instruction::Stop));
        let restore = FromCoordinator::Restore { up_to: 4 };
        assert_eq!(member.receive(restore), Some(Instruction::Restore { up_to: 4 }));
    }

    #[test]
    fn after_the_end_nothing_means_anything() {
        let mut member = Member::new(WorkerId(7));
        let end = FromCoordinator::End { reason: "over".into() };
        assert_eq!(member.receive(end.clone()), Some(Instruction::End { reason: "over".into() }));
        assert_eq!(member.receive(end), None);
        assert_eq!(member.receive(form(9, &[7])), None);
    }
}
