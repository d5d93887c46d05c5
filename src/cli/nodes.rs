//! `mattock train` on several machines: which of them this is, and what those do that have no coordinator.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;

use super::train::TrainArgs;
use super::worker::TOKEN_VARIABLE;
use crate::exit::{Exit, Failure};
use crate::launch::{
    Deadlines, Flags, Followed, FollowedRun, LaunchError, Place, TokenSource, address_towards_others,
    stop_signals,
};
use crate::recipe::Resolved;

/// The join token, in the run's folder.
pub(super) const TOKEN: &str = "token";
/// Seconds that machines wait for each other.
const WAIT_S: u64 = 600;

/// Which machine of how many this is, and how they find each other
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Several machines (one process on each, with the same arguments)")]
pub struct NodeArgs {
    /// Which machine this is, from 0 [default: what torchrun, srun, an Indexed Job or mpirun says]
    #[arg(long, value_name = "R", requires = "nodes")]
    pub node_rank: Option<u32>,
    /// How many machines there are; 1 is this one alone, whatever a launcher says
    #[arg(long, value_name = "N", env = "MATTOCK_NODES", value_parser = clap::value_parser!(u32).range(1..))]
    pub nodes: Option<u32>,
    /// Where machine 0 has its coordinator listen [default: its address towards the others, a free port]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Where machine 0 leaves the join token for the others [default: token in --out]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Seconds that machines wait for each other before training begins [default: 600]
    #[arg(long, value_name = "SECONDS")]
    pub wait: Option<u64>,
}

impl NodeArgs {
    /// Finds out where this process is.
    ///
    /// # Errors
    /// Bad input where flags and variables do not say one thing.
    pub(super) fn place(&self) -> Result<Place, Failure> {
        let flags = Flags { node_rank: self.node_rank, nodes: self.nodes };
        Place::find(flags, &|name| std::env::var(name).ok()).map_err(Failure::bad_input)
    }

    /// Where the join token is written.
    pub(super) fn token_file(&self, folder: &Path) -> PathBuf {
        self.token_file.clone().unwrap_or_else(|| folder.join(TOKEN))
    }

    /// Where the coordinator listens.
    pub(super) fn listen(&self, place: &Place) -> Result<SocketAddr, Failure> {
        match self.listen {
            Some(address) => Ok(address),
            None if place.nodes > 1 => Ok((address_towards_others()?, 0).into()),
            None => Ok(([127, 0, 0, 1], 0).into()),
        }
    }

    /// How long machines wait for each other.
    pub(super) fn wait(&self) -> Duration {
        Duration::from_secs(self.wait.unwrap_or(WAIT_S))
    }

    fn token_source(&self, out: Option<&Path>) -> Result<TokenSource, Failure> {
        match (&self.token_file, std::env::var(TOKEN_VARIABLE), out) {
            (Some(file), ..) => Ok(TokenSource::File(file.clone())),
            (None, Ok(text), _) => Ok(TokenSource::Text(text)),
            (None, Err(_), Some(out)) => Ok(TokenSource::File(self.token_file(out))),
            (None, Err(_), None) => {
                Err(Failure::bad_input(anyhow!("no join token: give --out DIR, or set {TOKEN_VARIABLE}")))
            }
        }
    }
}

/// Runs this machine's workers of a run whose coordinator is on machine 0.
///
/// # Errors
/// A failed run, also where there is none to join in time.
pub(super) fn follow(args: &TrainArgs, recipe: &Resolved, place: &Place) -> Result<Exit, Failure> {
    let run = FollowedRun {
        workers: args.workers,
        worker: Box::new(args.worker_program()?),
        token: args.nodes.token_source(args.out.as_deref())?,
        respawn: !args.no_respawn,
        wait: args.nodes.wait(),
        stop: Deadlines::new(recipe.plan.elastic.timeout).stop,
    };
    // On this very thread: the kernel ties children to the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let node = place.rank;
    let followed = runtime.map_err(Failure::internal)?.block_on(async {
        let stops = stop_signals().map_err(Failure::internal)?;
        let say = |role: Option<_>, line: &str| match role {
            Some(role) => eprintln!("[node {node} {role}] {line}"),
            None => eprintln!("[node {node}] {line}"),
        };
        run.supervise(stops, say).await.map_err(|error: LaunchError| Failure::internal(error))
    })?;
    match followed {
        Followed::Completed => Ok(Exit::Done),
        Followed::Stopped => Ok(Exit::Interrupted),
        Followed::BadInput => Err(Failure::bad_input(anyhow!(
            "a worker of node {node} refused its input: what it said is above"
        ))),
        Followed::Failed(why) => Err(Failure::run(anyhow!(why))),
    }
}
