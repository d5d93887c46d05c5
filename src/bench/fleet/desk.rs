//! What the coordinator's deciding task does, without sockets: encoded messages in, decisions out, and what that costs.

use std::ops::{AddAssign, Sub};
use std::time::{Duration, Instant};

use mattock_coordinator::event::Event as Told;
use mattock_coordinator::membership::{Action, Candidate, Config, Event, Registry};
use mattock_coordinator::protocol::{Formation, FromCoordinator, FromWorker};
use mattock_coordinator::{Ledger, WorkerId, wire};
use rustix::time::{ClockId, clock_gettime};

/// What was done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Load {
    /// Messages of workers.
    pub(crate) received: u64,
    /// Their bytes.
    pub(crate) received_bytes: u64,
    /// Messages to workers, heartbeats left out.
    pub(crate) sent: u64,
    /// Their bytes.
    pub(crate) sent_bytes: u64,
    /// Rings formed.
    pub(crate) rings: u64,
    /// Steps recorded.
    pub(crate) steps: u64,
    /// Processor time.
    pub(crate) cpu: Duration,
    /// That part of it in which more came than pulses and reports.
    pub(crate) cpu_of_changes: Duration,
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.sent += other.sent;
        self.sent_bytes += other.sent_bytes;
        self.rings += other.rings;
        self.steps += other.steps;
        self.cpu += other.cpu;
        self.cpu_of_changes += other.cpu_of_changes;
    }
}

impl Sub for Load {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            received: self.received - other.received,
            received_bytes: self.received_bytes - other.received_bytes,
            sent: self.sent - other.sent,
            sent_bytes: self.sent_bytes - other.sent_bytes,
            rings: self.rings - other.rings,
            steps: self.steps - other.steps,
            cpu: self.cpu - other.cpu,
            cpu_of_changes: self.cpu_of_changes - other.cpu_of_changes,
        }
    }
}

/// What workers, or the launcher, say, when it arrives.
pub(super) enum Said {
    /// An encoded message.
    Message(WorkerId, Vec<u8>),
    /// A worker's process has ended.
    Exited(WorkerId),
    /// Time has passed.
    Tick,
}

/// What the world must know of the decisions.
#[derive(Debug)]
pub(super) enum Decision {
    Admit(WorkerId),
    Lose(WorkerId),
    Recall { generation: u64, members: Vec<WorkerId> },
    Form(Formation),
    Start(u64),
}

/// The coordinator's registry and ledger.
pub(super) struct Desk {
    registry: Registry,
    ledger: Option<Ledger>,
    micro_batches: u32,
    pub(super) load: Load,
    /// Something has come that is neither pulse nor report.
    changing: bool,
    /// The longest that decisions about a slice of time took.
    pub(super) longest: Duration,
    /// The largest message of a ring.
    pub(super) ring_bytes: usize,
}

impl Desk {
    pub(super) fn new(config: Config, now: Instant) -> Self {
        let micro_batches = config.micro_batches;
        let (registry, ledger, load) = (Registry::new(config, now), None, Load::default());
        Self {
            registry,
            ledger,
            micro_batches,
            load,
            changing: false,
            longest: Duration::ZERO,
            ring_bytes: 0,
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.registry.deadline()
    }

    pub(super) fn phase(&self) -> String {
        format!("{:?} with {} workers", self.registry.phase(), self.registry.workers().count())
    }

    /// Takes in what has arrived within a slice of time, each at its moment.
    ///
    /// # Errors
    /// Where the run would end.
    pub(super) fn take_in(&mut self, said: &[(Instant, Said)]) -> Result<Vec<Decision>, String> {
        let mut decisions = Vec::new();
        let before = clock_gettime(ClockId::ThreadCPUTime);
        for (now, said) in said {
            for event in self.meaning(said)? {
                let mut actions = Vec::new();
                self.registry.step(*now, event, &mut actions);
                for action in actions {
                    decisions.extend(self.act(action)?);
                }
            }
        }
        let after = clock_gettime(ClockId::ThreadCPUTime);
        let took = Duration::new(after.tv_sec as u64, after.tv_nsec as u32)
            - Duration::new(before.tv_sec as u64, before.tv_nsec as u32);
        self.load.cpu += took;
        if std::mem::take(&mut self.changing) {
            self.load.cpu_of_changes += took;
        }
        self.longest = self.longest.max(took);
        Ok(decisions)
    }

    fn meaning(&mut self, said: &Said) -> Result<Vec<Event>, String> {
        let (worker, bytes) = match said {
            Said::Tick => return Ok(vec![Event::Tick]),
            Said::Exited(worker) => {
                self.changing = true;
                return Ok(vec![Event::Lost(*worker, "its process ended".to_owned())]);
            }
            Said::Message(worker, bytes) => (*worker, bytes),
        };
        self.load.received += 1;
        self.load.received_bytes += bytes.len() as u64;
        let message: FromWorker =
            wire::decode(&bytes[wire::HEADER_BYTES..]).map_err(|error| error.to_string())?;
        self.changing |= !matches!(message, FromWorker::Pulse(_) | FromWorker::Step(_));
        Ok(vec![match message {
            FromWorker::Hello(about) => {
                Event::Joined(worker, Candidate { address: about.address, fingerprint: about.fingerprint })
            }
            FromWorker::Ready { step } => Event::Ready(worker, step),
            FromWorker::Linked { generation } => Event::Linked(worker, generation),
            FromWorker::Held { generation, holding } => {
                let current = self.registry.formation().is_some_and(|ring| ring.generation == generation);
                let may = |ledger: &Ledger| holding.step.is_none_or(|step| ledger.may_hold(worker, step));
                if current && !self.ledger.as_ref().is_none_or(may) {
                    return Err(format!("{worker} holds a state that it has not reported"));
                }
                Event::Held(worker, generation, holding)
            }
            FromWorker::Broken(broken) => Event::Broken(worker, broken),
            FromWorker::Pulse(pulse) => Event::Pulse(worker, pulse),
            FromWorker::Step(report) => {
                let records =
                    self.ledger.as_mut().map_or(Ok(Vec::new()), |ledger| ledger.report(worker, report));
                let records = records.map_err(|error| error.to_string())?;
                let stepped = (!records.is_empty()).then_some(Event::Stepped);
                for record in records {
                    self.load.steps += 1;
                    // As it is written for the launcher.
                    let line =
                        serde_json::to_string(&Told::Step(record)).map_err(|error| error.to_string())?;
                    std::hint::black_box(line);
                }
                return Ok(std::iter::once(Event::Heard(worker)).chain(stepped).collect());
            }
            _ => Event::Heard(worker),
        }])
    }

    fn act(&mut self, action: Action) -> Result<Option<Decision>, String> {
        Ok(match action {
            Action::Admit(worker) => Some(Decision::Admit(worker)),
            Action::Lose(worker, _) => Some(Decision::Lose(worker)),
            Action::Recall { generation, members, reason } => {
                self.send(&FromCoordinator::Recall { generation, reason }, members.len())?;
                Some(Decision::Recall { generation, members })
            }
            Action::Form(formation) => {
                self.load.rings += 1;
                let bytes = self.send(&FromCoordinator::Form(formation.clone()), formation.places.len())?;
                self.ring_bytes = self.ring_bytes.max(bytes);
                self.ledger = Some(match self.ledger.take() {
                    Some(ledger) => ledger.reformed(formation.clone()).map_err(|error| error.to_string())?,
                    None => Ledger::new(self.micro_batches, formation.clone()),
                });
                Some(Decision::Form(formation))
            }
            Action::Start(formation) => {
                let generation = formation.generation;
                self.send(&FromCoordinator::Start { generation }, formation.places.len())?;
                Some(Decision::Start(generation))
            }
            Action::End(_, reason) | Action::Refuse(_, reason) => return Err(reason),
            Action::Release(..)
            | Action::Restore(_)
            | Action::Wait { .. }
            | Action::Stop
            | Action::Quarantine(..) => None,
        })
    }

    /// Encodes a message once for so many; returns its length.
    fn send(&mut self, message: &FromCoordinator, to: usize) -> Result<usize, String> {
        let bytes = wire::encode(message).map_err(|error| error.to_string())?.len();
        self.load.sent += to as u64;
        self.load.sent_bytes += (to * bytes) as u64;
        Ok(bytes)
    }
}
