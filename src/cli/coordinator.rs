//! `mattock coordinator`: the arguments.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::exit::EXIT_CODES;

const EXAMPLES: &str = "\
Examples:
  mattock coordinator configs/quickstart.toml --listen 0.0.0.0:4433 --token-file run.token
";

/// Run a coordinator alone: workers elsewhere join it with the token that it writes
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct CoordinatorArgs {
    /// The recipe, or the resolved recipe in a run's folder
    pub recipe: PathBuf,
    /// The run's folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Where workers reach it; port 0 takes a free one and reports it in the first event
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Where to write the join token, readable by the owner only
    #[arg(long, value_name = "FILE")]
    pub token_file: PathBuf,
    /// Go on from the newest checkpoint, or from that of STEP
    #[arg(long, value_name = "STEP", num_args = 0..=1, require_equals = true)]
    pub resume: Option<Option<u64>>,
}
