//! Coordinators and data planes that are wrong on purpose: each must be caught by the invariant that is there for it.

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Event, Outcome};
use mattock_coordinator::protocol::{Finish, Formation};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// One member of a ring is told of another ring.
    TwoRings,
    /// Training starts before all links are up.
    EarlyStart,
    /// A ring is formed under a generation that does not grow.
    StaleGeneration,
    /// A micro-batch is left out.
    LostShare,
    /// A step is committed before the last rank has contributed.
    HastyCommit,
    /// A step is recorded twice.
    DoubleRecord,
    /// A step is recorded under a hash that no rank has.
    WrongRecord,
    /// Silence is never noticed.
    DeafTimer,
    /// The timer is due again and again.
    StuckTimer,
    /// Something is decided after the end.
    AfterTheEnd,
    /// A run that failed is called complete.
    FalseOutcome,
    /// Whoever comes is let in.
    OpenDoor,
    /// The next ring is formed when the first has said what it holds.
    EarlyRing,
    /// Workers go on after they have said what they hold.
    GoesOn,
    /// All micro-batches of an interrupted step are handed out again.
    AllAgain,
    /// A rank that has no state is to give it to the others.
    WrongSource,
    /// Steps that only some could report are never recorded.
    ForgetsSteps,
    /// Whoever was sent away is listened to.
    NoFence,
    /// A worker that trains is called lost.
    WrongVictim,
    /// A coordinator that takes over does not hear what was reported to the one before.
    ForgetsPast,
    /// A coordinator never looks whether another has taken over.
    NeverLooks,
}

impl Sabotage {
    /// Each, with the invariant that must notice.
    pub(crate) const ALL: [(Self, &'static str); 21] = [
        (Self::TwoRings, "one ring"),
        (Self::EarlyStart, "one ring"),
        (Self::StaleGeneration, "generations"),
        (Self::LostShare, "coverage"),
        (Self::HastyCommit, "lockstep"),
        (Self::DoubleRecord, "ledger"),
        (Self::WrongRecord, "ledger"),
        (Self::DeafTimer, "liveness"),
        (Self::StuckTimer, "timers"),
        (Self::AfterTheEnd, "finality"),
        (Self::FalseOutcome, "outcome"),
        (Self::OpenDoor, "admission"),
        (Self::EarlyRing, "recalled"),
        (Self::GoesOn, "recalled"),
        (Self::AllAgain, "recalled"),
        (Self::WrongSource, "state"),
        (Self::ForgetsSteps, "ledger"),
        (Self::NoFence, "fence"),
        (Self::WrongVictim, "outcome"),
        (Self::ForgetsPast, "outcome"),
        (Self::NeverLooks, "admission"),
    ];

    /// Changes what the registry decided.
    pub(crate) fn tamper(self, event: &Event, actions: &mut Vec<Action>, ended: bool) {
        match self {
            Self::EarlyStart => {
                let formed = actions.iter().find_map(|action| match action {
                    Action::Form(formation) => Some(formation.clone()),
                    _ => None,
                });
                actions.extend(formed.map(Action::Start));
            }
            Self::AfterTheEnd if ended => actions.push(Action::Stop),
            Self::OpenDoor => {
                if let Event::Joined(worker, _) = event {
                    *actions = vec![Action::Admit(*worker)];
                }
            }
            _ => actions.iter_mut().for_each(|action| self.tamper_with(action)),
        }
    }

    fn tamper_with(self, action: &mut Action) {
        match (self, action) {
            (Self::StaleGeneration, Action::Form(formation)) => formation.generation = 0,
            (Self::LostShare, Action::Form(formation) | Action::Start(formation)) => {
                formation.places[0].first.truncate(0)
            }
            (Self::AllAgain, Action::Form(formation) | Action::Start(formation)) => {
                formation.places.iter_mut().for_each(|place| place.first.clone_from(&place.micro_batches));
            }
            (Self::WrongSource, Action::Form(formation) | Action::Start(formation)) => {
                let last = formation.places.len() as u32 - 1;
                formation.source = formation.source.map(|source| if source == last { 0 } else { last });
            }
            (Self::WrongVictim, Action::Lose(worker, _)) => worker.0 ^= 1,
            (Self::FalseOutcome, Action::End(outcome @ (Outcome::Failed | Outcome::WorkerLost(_)), _)) => {
                *outcome = Outcome::Completed(Finish {
                    step: 0,
                    completed: true,
                    state_hash: 0,
                    held_out_loss: None,
                    unigram_loss: None,
                    parameters: 0,
                });
            }
            _ => {}
        }
    }

    /// What the member with this index is told of a ring.
    pub(crate) fn told(self, index: usize, mut formation: Formation) -> Formation {
        if self == Self::TwoRings && index == 0 {
            formation.places.push(formation.places[0].clone());
            formation.places[0].worker = WorkerId(u64::MAX);
        }
        formation
    }
}
