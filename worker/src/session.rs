//! A worker's life: enrol, join, link, train, finish.
//!
//! ```text
//! enrol ─ join ─ open task, load state ─ Ready ─┬─ Link ─ Linked ─ Train ─ steps ─ Finished ─ End
//!                                               └──── a newer generation ────┘
//! ```
//!
//! Deliberately absent: decisions. Which ring, when to start and whether the run goes on is the coordinator's to say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use burn::backend::Autodiff;
use mattock_checkpoint::Outcome;
use mattock_collectives::{
    CollectiveError, Congestion, Generation, Group, GroupConfig, JoinError as RingError, Node, NodeConfig,
    NodeError, Rank, Ring, RingSpec, TransportChoice, WorldSize,
};
use mattock_coordinator::identity::{Identity, JoinToken};
use mattock_coordinator::membership::Instruction;
use mattock_coordinator::protocol::{About, Failure, Finish, Formation, FromWorker, StepReport};
use mattock_coordinator::{Client, ClientError, JoinError};
use mattock_kernels::{Cpu, Device, DeviceChoice, DeviceError, TrainBackend};

use crate::control::Control;
use crate::evaluate::held_out;
use crate::plan::Plan;
use crate::settings::Settings;
use crate::state::State;
use crate::storage::{self, Saver, StorageError};
use crate::task::{Facts, Source, Task, TaskError};
use crate::trainer::{StepDone, StepError, Trainer};

/// A collective waits this many timeouts: a peer may compute for long, and whether one is dead the coordinator says.
const COLLECTIVE_TIMEOUTS: u32 = 30;

/// From where and as what a worker runs.
pub struct Options<'a> {
    /// What lets it in.
    pub token: JoinToken,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Among the workers of this host.
    pub local_rank: usize,
    /// What carries gradients; on all workers of a run shared memory only if all want it.
    pub transport: TransportChoice,
    /// How fast to send between hosts.
    pub congestion: Congestion,
    /// Folder for what is built once and reused.
    pub cache: PathBuf,
    /// From the recipe's text to the plan.
    pub resolve: &'a dyn Fn(&str) -> Result<Plan, String>,
}

/// Why a worker ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Could not join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The coordinator is gone.
    #[error(transparent)]
    Coordinator(#[from] ClientError),
    /// The coordinator ended the run.
    #[error("the run is over: {0}")]
    Ended(String),
    /// The data plane could not start.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The ring's links did not come up.
    #[error("the ring of generation {generation} did not come up: {source}")]
    Ring {
        /// Which.
        generation: u64,
        /// Why.
        source: RingError,
    },
    /// The coordinator's words make no sense.
    #[error("the coordinator sent {0}; this is a bug")]
    Nonsense(String),
    /// The recipe.
    #[error("{0}")]
    Recipe(String),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Model and data.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// Checkpoints.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// What computes cannot be told.
    #[error("cannot read this program, so nobody can tell whether its bits are the others': {0}")]
    Program(std::io::Error),
    /// The system refuses a thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl SessionError {
    /// Whether it is the user's input that is at fault.
    pub fn is_bad_input(&self) -> bool {
        matches!(self, Self::Recipe(_) | Self::Device(_) | Self::Task(_))
            || matches!(self, Self::Storage(StorageError::Load(_) | StorageError::Location(_)))
    }

    /// The ring neighbour that was lost, if that is what happened.
    fn lost_rank(&self) -> Option<u32> {
        match self {
            Self::Step(StepError::Collective(CollectiveError::PeerLost { peer, .. })) => Some(peer.0),
            _ => None,
        }
    }

    /// Whether the coordinator knows already.
    fn is_known(&self) -> bool {
        let cancelled = matches!(self, Self::Step(StepError::Collective(CollectiveError::Cancelled { .. })));
        cancelled || matches!(self, Self::Ended(_) | Self::Coordinator(_))
    }
}

/// Runs a worker from its token to the end of the run.
///
/// # Errors
/// See [`SessionError`].
pub fn run<T: Task>(options: &Options<'_>) -> Result<(), SessionError> {
    compute_on_this_thread();
    let device = Device::find(options.device, options.local_rank)?;
    let limit = options.token.timeout();
    let enrollment = Client::enroll(&options.token, limit)?;
    let node = Node::start(NodeConfig {
        group: GroupConfig { timeout: limit * COLLECTIVE_TIMEOUTS, ..GroupConfig::default() },
        transport: options.transport,
        congestion: options.congestion,
        ..NodeConfig::new(data_identity(enrollment.identity()), SocketAddr::new(enrollment.local_ip(), 0))
    })?;
    let about = About {
        pid: std::process::id(),
        host: crate::host::name(),
        address: node.local_addr().to_string(),
        fingerprint: crate::host::fingerprint(&device).map_err(SessionError::Program)?,
    };
    let client = enrollment.join(about)?;
    let (run, recipe, settings) =
        (client.run().to_owned(), client.recipe().to_owned(), client.settings().to_owned());
    let control = Control::start(client)?;
    let worker = Worker { options, device, node, control, limit, run, recipe };
    let ended = worker.work::<T>(&settings);
    let ended = worker.say_goodbye(ended);
    worker.control.close();
    ended
}

/// Makes this thread one of those that compute, so that with one thread nothing is handed to and fro. The price: with one
/// thread, what another thread hands to rayon runs only while this one computes, so this one must never wait for it.
fn compute_on_this_thread() {
    if let Err(error) = rayon::ThreadPoolBuilder::new().use_current_thread().build_global() {
        // A pool that somebody else has made computes the same, a little slower.
        tracing::debug!(%error, "the threads are not ours");
    }
}

fn data_identity(identity: &Identity) -> mattock_collectives::Identity {
    mattock_collectives::Identity {
        certificates: vec![identity.certificate.clone()],
        private_key: identity.key.clone(),
        root: identity.authority.clone(),
    }
}

/// A joined worker.
struct Worker<'a> {
    options: &'a Options<'a>,
    device: Device,
    node: Node,
    control: Control,
    limit: Duration,
    run: String,
    recipe: String,
}

impl Worker<'_> {
    /// Opens what is trained, and trains it on the device that was found.
    fn work<T: Task>(&self, settings: &str) -> Result<(), SessionError> {
        let plan = (self.options.resolve)(&self.recipe).map_err(SessionError::Recipe)?;
        let settings: Settings = serde_json::from_str(settings)
            .map_err(|error| SessionError::Nonsense(format!("settings: {error}")))?;
        let source = Source {
            model: &plan.model,
            data: &plan.data,
            cache: &self.options.cache,
            progress: &|text| tracing::info!("{text}"),
        };
        let task = T::open(&source)?;
        let (space, initial) = State::initial(&task, plan.seed);
        let (state, notices) = storage::start(&settings, &space, initial)?;
        for text in notices {
            self.control.report(FromWorker::Notice { text })?;
        }
        match self.device {
            Device::Cpu => {
                let trainer = Trainer::new(&task, &plan, space, state, Default::default());
                Training::<Autodiff<Cpu>, T> {
                    worker: self,
                    task: &task,
                    plan: &plan,
                    settings: &settings,
                    trainer,
                }
                .run()
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(index) => {
                let trainer = Trainer::new(&task, &plan, space, state, mattock_kernels::cuda_device(index));
                Training::<Autodiff<mattock_kernels::Cuda>, T> {
                    worker: self,
                    task: &task,
                    plan: &plan,
                    settings: &settings,
                    trainer,
                }
                .run()
            }
        }
    }

    /// Tells the coordinator of a failure, and waits until it has ended the run; its reason is the better one.
    fn say_goodbye(&self, ended: Result<(), SessionError>) -> Result<(), SessionError> {
        let Err(error) = ended else { return Ok(()) };
        if !error.is_known() {
            let failure = Failure {
                text: error.to_string(),
                bad_input: error.is_bad_input(),
                lost_rank: error.lost_rank(),
            };
            if self.control.report(FromWorker::Failed(failure)).is_err() {
                return Err(error);
            }
        }
        while let Some(instruction) = self.control.next(self.limit) {
            if let Instruction::End { reason } = instruction {
                return Err(if error.is_known() { SessionError::Ended(reason) } else { error });
            }
        }
        Err(error)
    }
}

/// Where the exchange has failed: what this rank did last, on standard error.
fn tell_history(group: &Group, error: &SessionError) {
    use CollectiveError::{Cancelled, Closed};
    if let SessionError::Step(StepError::Collective(error)) = error
        && !matches!(error, Cancelled { .. } | Closed { .. })
    {
        let history = group.history();
        let mut text = format!("the last operations of rank {}:\n", group.ring().rank());
        text.extend(history.iter().map(|record| format!("  {record}\n")));
        // In one piece: others may write to the same place.
        eprint!("{text}");
    }
}

/// A worker with a trainer.
struct Training<'a, B: TrainBackend, T: Task> {
    worker: &'a Worker<'a>,
    task: &'a T,
    plan: &'a Plan,
    settings: &'a Settings,
    trainer: Trainer<'a, B, T>,
}

impl<B: TrainBackend, T: Task> Training<'_, B, T> {
    /// Follows the coordinator from ring to ring until the run is over.
    fn run(mut self) -> Result<(), SessionError> {
        let control = &self.worker.control;
        control.report(FromWorker::Ready { step: self.trainer.state().step })?;
        let mut linked: Option<(Arc<Group>, Formation, u32)> = None;
        loop {
            match control.next(self.worker.limit) {
                Some(Instruction::Link { rank, formation }) => {
                    drop(linked.take());
                    let group = Arc::new(self.link(rank, &formation)?);
                    control.guard(&group);
                    if rank == 0 && group.ring().world_size().get() > 1 {
                        let text = format!("gradients travel by {}", group.transport());
                        control.report(FromWorker::Notice { text })?;
                    }
                    control.report(FromWorker::Linked { generation: formation.generation })?;
                    linked = Some((group, formation, rank));
                }
                Some(Instruction::Train(_)) => {
                    let Some((group, formation, rank)) = &linked else {
                        return Err(SessionError::Nonsense("a start without a ring".to_owned()));
                    };
                    let finish = self
                        .train(group, formation, *rank)
                        .inspect_err(|error| tell_history(group, error))?;
                    control.report(FromWorker::Finished(finish))?;
                }
                Some(Instruction::End { reason }) => {
                    return if self.is_done() { Ok(()) } else { Err(SessionError::Ended(reason)) };
                }
                Some(Instruction::Stop) | None => {}
            }
        }
    }

    fn is_done(&self) -> bool {
        self.trainer.state().step >= self.plan.steps || self.worker.control.stop_requested()
    }

    /// Brings up the links to both neighbours.
    fn link(&self, rank: u32, formation: &Formation) -> Result<Group, SessionError> {
        let nonsense =
            |what: &str| SessionError::Nonsense(format!("{what} in generation {}", formation.generation));
        let places = &formation.places;
        if formation.step != self.trainer.state().step {
            return Err(nonsense("a ring for another step"));
        }
        let world = WorldSize::new(places.len() as u32).ok_or_else(|| nonsense("an empty ring"))?;
        let ring = Ring::new(Rank(rank), world, Generation(formation.generation))
            .ok_or_else(|| nonsense("a rank outside the ring"))?;
        let (next, prev) = (&places[ring.next().0 as usize], &places[ring.prev().0 as usize]);
        let address = next.address.parse().map_err(|_| nonsense("an address that is none"))?;
        let spec = RingSpec { ring, next: (address, next.worker.dns_name()), prev: prev.worker.dns_name() };
        let generation = formation.generation;
        self.worker.node.join_ring(spec).map_err(|source| SessionError::Ring { generation, source })
    }

    /// Trains to the last step, or until somebody stops the run.
    fn train(&mut self, group: &Group, formation: &Formation, rank: u32) -> Result<Finish, SessionError> {
        let facts = self.task.facts();
        let assigned = formation.places[rank as usize].micro_batches.clone();
        let mut saver = match rank {
            0 => Some(self.saver(&facts)?),
            _ => None,
        };
        let mut state_hash = None;
        while self.trainer.state().step < self.plan.steps {
            let before = group.counters();
            let done = self.trainer.step(group, &assigned, self.worker.control.stop_requested())?;
            state_hash = Some(done.state_hash);
            self.checkpoint(saver.as_mut(), &done)?;
            let after = group.counters();
            let seconds = self.trainer.clock().lap();
            self.worker.control.report(FromWorker::Step(StepReport {
                generation: formation.generation,
                step: done.step,
                rank,
                loss: done.loss,
                grad_norm: done.grad_norm,
                lr: done.lr,
                state_hash: done.state_hash,
                tokens: u64::from(self.plan.batch.size) * self.task.tokens_per_sample(),
                wide_blocks: done.wide_blocks as u64,
                micro_batches: assigned.clone(),
                tx_bytes: after.sent_bytes - before.sent_bytes,
                rx_bytes: after.received_bytes - before.received_bytes,
                seconds,
            }))?;
            if done.stop {
                break;
            }
        }
        self.finish(saver, state_hash, &facts)
    }

    fn saver(&self, facts: &Facts) -> Result<Saver, StorageError> {
        let Worker { run, recipe, .. } = self.worker;
        Saver::new(self.plan, self.settings, self.trainer.space(), facts, run, recipe)
    }

    /// Copies the state out where a checkpoint is due, and reports what became of earlier ones.
    fn checkpoint(&mut self, saver: Option<&mut Saver>, done: &StepDone) -> Result<(), SessionError> {
        let Some(saver) = saver else { return Ok(()) };
        let every = self.plan.checkpoint.every;
        if every > 0 && done.step.is_multiple_of(every) {
            self.trainer.clock().enter(crate::phases::Phase::Checkpoint);
            saver.save(self.trainer.state(), done.state_hash)?;
        }
        self.tell_outcomes(saver.outcomes())
    }

    fn tell_outcomes(&self, outcomes: Vec<Outcome>) -> Result<(), SessionError> {
        for outcome in outcomes {
            self.worker.control.report(match outcome {
                Outcome::Saved(saved) => FromWorker::Checkpoint {
                    step: saved.step,
                    url: saved.url,
                    bytes: saved.bytes,
                    seconds: saved.took.as_secs_f64(),
                },
                Outcome::Superseded { step, by } => FromWorker::Notice {
                    text: format!(
                        "the checkpoint of step {step} was not written: that of step {by} took its place"
                    ),
                },
                Outcome::Failed { step, error, .. } => FromWorker::Notice {
                    text: format!("the checkpoint of step {step} was not written: {error}"),
                },
                other => FromWorker::Notice { text: format!("{other:?}") },
            })?;
        }
        Ok(())
    }

    /// The last checkpoint and the held-out loss, by the rank that writes.
    fn finish(
        &mut self,
        saver: Option<Saver>,
        state_hash: Option<u64>,
        facts: &Facts,
    ) -> Result<Finish, SessionError> {
        let state = self.trainer.state();
        let state_hash = state_hash.unwrap_or_else(|| state.hash());
        let completed = state.step >= self.plan.steps;
        let mut held_out_loss = None;
        if let Some(mut saver) = saver {
            saver.save(state, state_hash)?;
            if completed {
                let (space, device) = (self.trainer.space(), self.trainer.device());
                held_out_loss =
                    held_out::<B::InnerBackend, T>(self.task, self.plan, space, &state.parameters, device);
            }
            self.tell_outcomes(saver.finish()?)?;
        }
        Ok(Finish {
            step: state.step,
            completed,
            state_hash,
            held_out_loss,
            unigram_loss: facts.unigram_loss,
            parameters: self.trainer.space().parameter_count() as u64,
        })
    }
}
