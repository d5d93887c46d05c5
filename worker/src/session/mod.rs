//! A worker's life: enrol, join, link, train, finish.
//!
//! ```text
//! enrol ─ join ─ open task, load state ─ Ready ─┬─ Link ─ Linked ─ Train ─ steps ─ Finished ─ End
//!                                               └─── the ring is recalled, or breaks ───┘
//! ```
//!
//! A worker that joins a run under way loads no state: it gets that of the others when its ring starts.
//!
//! Deliberately absent: decisions. Which ring, when to start and whether the run goes on is the coordinator's to say.

mod training;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use burn::backend::Autodiff;
use mattock_collectives::{
    CollectiveError, Congestion, GroupConfig, Node, NodeConfig, NodeError, TransportChoice,
};
use mattock_coordinator::identity::{Identity, JoinToken};
use mattock_coordinator::membership::Instruction;
use mattock_coordinator::protocol::{About, Blame, Failure, FromWorker};
use mattock_coordinator::{Client, ClientError, JoinError, Passport, WorkerId};
use mattock_kernels::{Cpu, Device, DeviceChoice, DeviceError};

use self::training::Training;
use crate::beginning::{Beginning, Beginnings};
use crate::control::Control;
use crate::params::Space;
use crate::plan::{Plan, Shard};
use crate::settings::Settings;
use crate::storage::StorageError;
use crate::succession::Succession;
use crate::task::{Source, Task, TaskError};
use crate::trainer::{StepError, Trainer};

/// A collective waits this many timeouts: a peer may compute for long, and whether one is dead the coordinator says.
const COLLECTIVE_TIMEOUTS: u32 = 30;

/// Who is to leave finishes the step that it is in, if that takes no longer than this part of a timeout.
const LEAVE: u32 = 4;

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
    /// Each message is a reason to leave the run, after the step that is under way.
    pub leave: std::sync::mpsc::Receiver<String>,
    /// From the recipe's text to the plan.
    pub resolve: &'a dyn Fn(&str) -> Result<Plan, String>,
    /// Hears how far it has come.
    pub told: &'a dyn Fn(Milestone),
}

/// How far a worker has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    /// The coordinator has let it in.
    Joined,
    /// It has taken part in a step.
    Stepped,
}

/// How a worker's part in a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All steps of the run are done.
    Completed,
    /// The run was stopped on request.
    Stopped,
    /// This worker was told to leave, and the run goes on.
    Left,
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
    /// Another coordinator has the run.
    #[error(
        "the coordinator that was joined, incarnation {stale}, is stale: incarnation {incarnation} at {address} has the \
         run; join with the token that it wrote"
    )]
    Stale {
        /// Of the one that was joined.
        stale: u64,
        /// Of the one that has the run.
        incarnation: u64,
        /// Where that one is.
        address: SocketAddr,
    },
    /// The data plane could not start.
    #[error(transparent)]
    Node(#[from] NodeError),
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
        self.blame() == Blame::Input
    }

    /// Whether others would meet the same.
    fn blame(&self) -> Blame {
        match self {
            Self::Recipe(_) | Self::Device(_) | Self::Task(_) => Blame::Input,
            Self::Storage(StorageError::Load(_) | StorageError::Location(_)) => Blame::Input,
            Self::Storage(_) => Blame::Run,
            Self::Step(StepError::Commit(_)) => Blame::Run,
            Self::Step(StepError::Collective(
                CollectiveError::Mismatch { .. } | CollectiveError::InvalidInput { .. },
            )) => Blame::Run,
            _ => Blame::Worker,
        }
    }

    /// Whether the coordinator knows already.
    fn is_known(&self) -> bool {
        matches!(self, Self::Ended(_) | Self::Coordinator(_))
    }
}

/// Runs a worker from its token to the end of the run.
///
/// # Errors
/// See [`SessionError`].
pub fn run<T: Task>(options: Options<'_>) -> Result<End, SessionError> {
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
    let passport = enrollment.passport();
    let client = enrollment.join(about.clone())?;
    let succession = succession(&client, passport, about);
    if let Some(other) = succession.as_ref().and_then(|succession| succession.above(client.incarnation())) {
        let stale = client.incarnation();
        client.close();
        return Err(SessionError::Stale { stale, incarnation: other.incarnation, address: other.address });
    }
    (options.told)(Milestone::Joined);
    let (run, recipe, settings) =
        (client.run().to_owned(), client.recipe().to_owned(), client.settings().to_owned());
    let (id, under_way) = (client.worker(), client.under_way());
    let control = Control::start(client, node, limit, succession)?;
    control.leave_on(options.leave, limit / LEAVE)?;
    let (cache, resolve, told) = (options.cache.as_path(), options.resolve, options.told);
    let worker = Worker { id, cache, resolve, told, device, control, limit, run, recipe, under_way };
    let ended = worker.work::<T>(&settings);
    let ended = worker.say_goodbye(ended);
    worker.control.close();
    ended
}

/// What leads back to the run when its coordinator dies, where another can take over.
fn succession(client: &Client, passport: Passport, about: About) -> Option<Succession> {
    let settings: Settings = serde_json::from_str(client.settings()).ok()?;
    let leases = crate::lease::beside(&settings.checkpoints).ok()?;
    (client.incarnation() > 0).then_some(Succession { passport, about, leases })
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

fn beginnings<'a, T: Task>(
    settings: &'a Settings,
    task: &'a T,
    plan: &'a Plan,
    space: &'a Space,
    flawed: Option<u64>,
) -> Beginnings<'a, T> {
    let divided = plan.parallel.shard != Shard::None;
    Beginnings { settings, task, space, seed: plan.seed, divided, flawed }
}

/// A joined worker.
struct Worker<'a> {
    id: WorkerId,
    cache: &'a Path,
    resolve: &'a dyn Fn(&str) -> Result<Plan, String>,
    told: &'a dyn Fn(Milestone),
    device: Device,
    control: Control,
    limit: Duration,
    run: String,
    recipe: String,
    /// The state comes from the others.
    under_way: bool,
}

impl Worker<'_> {
    /// Opens what is trained, and trains it on the device that was found.
    fn work<T: Task>(&self, settings: &str) -> Result<End, SessionError> {
        let plan = (self.resolve)(&self.recipe).map_err(SessionError::Recipe)?;
        let settings: Settings = serde_json::from_str(settings)
            .map_err(|error| SessionError::Nonsense(format!("settings: {error}")))?;
        let source = Source {
            model: &plan.model,
            data: &plan.data,
            cache: self.cache,
            progress: &|text| tracing::info!("{text}"),
        };
        let task = T::open(&source)?;
        let space = Space::of_task(&task);
        let beginning = match self.under_way {
            // Others will give it theirs.
            true => Beginning::Nothing,
            false => self.told(beginnings(&settings, &task, &plan, &space, None).start()?),
        };
        match self.device {
            Device::Cpu => {
                let trainer = Trainer::new(&task, &plan, space, beginning, Default::default());
                Training::<Autodiff<Cpu>, T>::new(self, &task, &plan, &settings, trainer).run()
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(index) => {
                let device = mattock_kernels::cuda_device(index);
                let trainer = Trainer::new(&task, &plan, space, beginning, device);
                type Backend = Autodiff<mattock_kernels::Cuda>;
                Training::<Backend, T>::new(self, &task, &plan, &settings, trainer).run()
            }
        }
    }

    /// What was found in storage, once the coordinator was told what was passed over to find it.
    fn told(&self, (beginning, notices): (Beginning, Vec<String>)) -> Beginning {
        for text in notices {
            self.control.report(FromWorker::Notice { text });
        }
        beginning
    }

    /// Tells the coordinator of a failure, and waits until it has ended the run; its reason is the better one.
    fn say_goodbye(&self, ended: Result<End, SessionError>) -> Result<End, SessionError> {
        let Err(error) = ended else { return ended };
        if !error.is_known() {
            let failure = Failure { text: error.to_string(), blame: error.blame() };
            self.control.report(FromWorker::Failed(failure));
        }
        while let Some(instruction) = self.control.next(self.limit) {
            if let Instruction::End { reason } = instruction {
                return Err(if error.is_known() { SessionError::Ended(reason) } else { error });
            }
        }
        Err(error)
    }
}
