//! `mattock worker`: the arguments.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::exit::EXIT_CODES;

const EXAMPLES: &str = "\
Examples:
  mattock worker --coordinator 10.0.0.1:4433 --token-file run.token
  MATTOCK_TOKEN=... mattock worker --coordinator 10.0.0.1:4433 --device cuda:0
";

/// Join a run as one worker
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct WorkerArgs {
    /// The coordinator's address
    #[arg(long, value_name = "ADDRESS")]
    pub coordinator: SocketAddr,
    /// The file with the join token; without it the environment's MATTOCK_TOKEN is read
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
}
