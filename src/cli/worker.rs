//! `mattock worker`: one worker, from its token to the end of the run.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::Args;
use mattock_collectives::{Congestion, TransportChoice};
use mattock_coordinator::identity::JoinToken;
use mattock_worker::DeviceError;
use mattock_worker::session::{self, End, Milestone, Options};
use mattock_worker::task::Task;

use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::launch::{self, WorkerEvent};
use crate::recipe::Resolved;

/// Holds the join token where no file is named.
pub(super) const TOKEN_VARIABLE: &str = "MATTOCK_TOKEN";

const EXAMPLES: &str = "\
SIGTERM, SIGUSR1 or Ctrl-C makes a worker leave after the step that it is in; the run goes on without it, or, with too few
workers left, ends with a checkpoint.

Examples:
  mattock worker --token-file run.token
  MATTOCK_TOKEN=$(cat run.token) mattock worker --device cuda:0
";

/// Join a run as one worker
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct WorkerArgs {
    /// The coordinator's address, if it is not the one in the token
    #[arg(long, value_name = "ADDRESS")]
    pub coordinator: Option<SocketAddr>,
    /// The file with the join token; without it the environment's MATTOCK_TOKEN is read
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Among the workers of this host; picks a device where several are there
    #[arg(long, value_name = "N", default_value = "0")]
    pub local_rank: usize,
    /// What carries gradients: auto (shared memory within hosts, QUIC between), quic or shm
    #[arg(long, value_name = "TRANSPORT", default_value = "auto")]
    pub transport: TransportChoice,
    /// How fast to send between hosts: steady, bbr (longer queues), or cubic (slow where packets are lost)
    #[arg(long, value_name = "CONTROL", default_value_t)]
    pub congestion: Congestion,
    /// End with the process that started it: for launchers
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// Runs `mattock worker`.
///
/// # Errors
/// Bad input where token, device, recipe or data are at fault; a failed run otherwise.
pub fn run<T: Task>(args: &WorkerArgs) -> Result<Exit, Failure> {
    if args.supervised {
        launch::die_with_parent().map_err(Failure::internal)?;
    }
    let mut token = args.token()?;
    token.address = args.coordinator.unwrap_or(token.address);
    let resolve = |text: &str| {
        Resolved::parse(text, Path::new("recipe.toml"))
            .map(|recipe| recipe.plan)
            .map_err(|error| error.to_string())
    };
    let options = Options {
        token,
        device: args.device.parse().map_err(|error: DeviceError| Failure::bad_input(error))?,
        local_rank: args.local_rank,
        transport: args.transport,
        congestion: args.congestion,
        leave: launch::reasons_to_leave().map_err(Failure::internal)?,
        cache: crate::cache::folder(),
        resolve: &resolve,
        told: &|milestone| {
            args.tell(match milestone {
                Milestone::Joined => WorkerEvent::Joined,
                Milestone::Stepped => WorkerEvent::Stepped,
            });
        },
    };
    match session::run::<T>(options) {
        Ok(end) => {
            args.tell(match end {
                End::Completed => WorkerEvent::Completed,
                End::Stopped => WorkerEvent::Stopped,
                End::Left => WorkerEvent::Left,
            });
            Ok(Exit::Done)
        }
        Err(error) if error.is_bad_input() => Err(Failure::bad_input(error)),
        Err(error) => Err(Failure::run(error)),
    }
}

impl WorkerArgs {
    /// Tells the launcher, if one is there. Where it does not listen, nobody needs to know.
    fn tell(&self, event: WorkerEvent) {
        if self.supervised
            && let Ok(line) = serde_json::to_string(&event)
        {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }

    fn token(&self) -> Result<JoinToken, Failure> {
        match (&self.token_file, std::env::var(TOKEN_VARIABLE)) {
            (Some(file), _) => JoinToken::read(file).map_err(Failure::bad_input),
            (None, Ok(text)) => JoinToken::parse(&text).map_err(Failure::bad_input),
            (None, Err(_)) => Err(Failure::bad_input(anyhow!(
                "no join token: give --token-file FILE, or set {TOKEN_VARIABLE}"
            ))),
        }
    }
}
