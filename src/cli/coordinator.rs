//! `mattock coordinator`: admits workers, forms the ring, and prints the run's events as JSON lines.
//!
//! Standard input takes commands of a launcher, a JSON object a line; its end is the launcher's own, and ends the run.
//!
//! The same command, with the secret that lies in the run's folder (or in the environment), takes over from a coordinator
//! that has died; the one that comes back after that ends by itself.

use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use mattock_coordinator::event::Event;
use mattock_coordinator::identity::RunSecret;
use mattock_coordinator::membership::{Config, Outcome};
use mattock_coordinator::{Command, Failover, Server, ServerConfig, ServerError};
use mattock_worker::lease;
use mattock_worker::plan::Shard;
use mattock_worker::settings::{Settings, Start};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::recipe::RecipeFile;
use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::launch::{self, SECRET_VARIABLE};
use crate::recipe::Resolved;
use crate::run_dir::{checkpoints_of, secret_of};

/// How long a join token is worth something.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The same under a launcher, which lets workers in for as long as the run lives, and removes the token at its end.
const LAUNCHED_TOKEN_LIFETIME: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
/// What a launcher's end says.
const STOP: &str = r#"{"stop":true}"#;
/// Events and commands that may wait.
const QUEUE_MAX: usize = 1024;

const EXAMPLES: &str = "\
Should the coordinator die, start the same command again: workers hold what they have for ten timeouts, find the new
coordinator by the lease beside the checkpoints, and training goes on. On another machine, --out must be the same folder, or
MATTOCK_RUN_SECRET the same secret (64 hexadecimal digits, from the start), and --run the same id.

Examples:
  mattock coordinator configs/quickstart.toml --out runs/first --listen 0.0.0.0:4433 --token-file run.token
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
    /// Workers to wait for before training starts
    #[arg(long, value_name = "N", default_value = "1")]
    pub workers: NonZeroU32,
    /// The run's id, which its checkpoints bear [default: drawn]
    #[arg(long, value_name = "ID")]
    pub run: Option<String>,
    /// Let workers with other binaries or devices train together: exactly once still, but not the same bits
    #[arg(long)]
    pub mixed: bool,
    /// End with the standard input: for launchers
    #[arg(long, hide = true)]
    pub supervised: bool,
    /// The newest step on record, from a launcher that starts another coordinator in the place of one that has died
    #[arg(long, hide = true, value_name = "STEP")]
    pub recorded: Option<u64>,
    /// Take this port, if it is free and --listen names none: that of the coordinator before
    #[arg(long, hide = true, value_name = "PORT")]
    pub port: Option<u16>,
    /// Where to write the join token, readable by the owner only
    #[arg(long, value_name = "FILE")]
    pub token_file: PathBuf,
    /// Go on from the newest checkpoint, or from that of STEP
    #[arg(long, value_name = "STEP", num_args = 0..=1, require_equals = true)]
    pub resume: Option<Option<u64>>,
    /// Go on from the newest checkpoint, or start afresh where there is none
    #[arg(long, conflicts_with = "resume")]
    pub resume_if_any: bool,
}

/// A launcher's command.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Stop(#[expect(dead_code, reason = "its presence says all")] bool),
    Shrink(u32),
    Ping(#[expect(dead_code, reason = "its presence says all")] bool),
    Exited { host: String, pid: u32, status: String, replaced: bool, left: usize },
}

/// Runs `mattock coordinator`; `out` is standard output.
///
/// # Errors
/// Bad input before it listens; a failed run after.
pub fn run(args: &CoordinatorArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    if args.supervised {
        launch::die_with_parent().map_err(Failure::internal)?;
    }
    let recipe = RecipeFile { recipe: args.recipe.clone(), sets: Vec::new() }.resolve_for_run()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (config, warning) = args.server_config(&recipe)?;
    runtime.map_err(Failure::internal)?.block_on(serve(args, config, warning, out))
}

impl CoordinatorArgs {
    /// What the server must know, and what the user should.
    fn server_config(&self, recipe: &Resolved) -> Result<(ServerConfig, Option<String>), Failure> {
        let plan = &recipe.plan;
        if self.mixed && plan.elastic.audit > 0 {
            return Err(Failure::bad_input(anyhow!(
                "`elastic.audit` compares bits, which workers of different kinds do not share: leave it or --mixed out"
            )));
        }
        let settings = Settings {
            checkpoints: checkpoints_of(&plan.checkpoint.to, &self.out),
            start: match self.resume {
                None if self.resume_if_any => Start::NewestIfAny,
                None => Start::Fresh,
                Some(None) => Start::Newest,
                Some(Some(step)) => Start::Step(step),
            },
        };
        let settings_json = serde_json::to_string(&settings).map_err(Failure::internal)?;
        let found = self.secret()?;
        let (failover, warning) =
            self.failover(&settings.checkpoints, &recipe.text, &settings_json, &found)?;
        let config = ServerConfig {
            listen: self.address(),
            advertise: match self.listen.ip().is_unspecified() {
                // Nobody can be sent to "any address".
                true => Some((launch::address_towards_others()?, 0).into()),
                false => None,
            },
            run: self.run.clone().unwrap_or_else(|| found.secret.public_id()),
            steps: plan.steps,
            recipe: recipe.text.clone(),
            settings: settings_json,
            launcher: self.supervised,
            token_lifetime: if self.supervised { LAUNCHED_TOKEN_LIFETIME } else { TOKEN_LIFETIME },
            membership: Config {
                micro_batches: plan.batch.micro_batches(),
                expected: self.workers.get().max(plan.elastic.min_workers),
                min_workers: plan.elastic.min_workers,
                max_workers: plan.elastic.max_workers,
                timeout: plan.elastic.timeout,
                mixed: self.mixed,
                divided: plan.parallel.shard != Shard::None,
            },
            failover,
        };
        Ok((config, warning))
    }

    /// Where to listen: at the port of the coordinator before, if it is free, so that whoever still speaks to that one learns
    /// at once that it is no more.
    fn address(&self) -> SocketAddr {
        let wanted = self.port.filter(|_| self.listen.port() == 0);
        let before = wanted.map(|port| SocketAddr::new(self.listen.ip(), port));
        before.filter(|address| UdpSocket::bind(address).is_ok()).unwrap_or(self.listen)
    }

    /// The run's secret: the environment's, or that in the run's folder, or a new one, which is left there.
    fn secret(&self) -> Result<Found, Failure> {
        if let Ok(text) = std::env::var(SECRET_VARIABLE) {
            let secret = RunSecret::parse(&text);
            let secret = secret.map_err(|error| Failure::bad_input(anyhow!("{SECRET_VARIABLE}: {error}")))?;
            return Ok(Found { secret, again: self.recorded.is_some() });
        }
        let path = secret_of(&self.out);
        match RunSecret::read(&path).map_err(Failure::bad_input)? {
            Some(secret) => Ok(Found { secret, again: true }),
            None => {
                let secret = RunSecret::draw().map_err(Failure::internal)?;
                std::fs::create_dir_all(&self.out).map_err(Failure::bad_input)?;
                secret.write(&path).map_err(Failure::bad_input)?;
                Ok(Found { secret, again: false })
            }
        }
    }

    /// What a take-over needs, or why there can be none.
    fn failover(
        &self,
        checkpoints: &str,
        recipe: &str,
        settings: &str,
        Found { secret, again }: &Found,
    ) -> Result<(Option<Failover>, Option<String>), Failure> {
        let store = lease::beside(checkpoints).map_err(Failure::bad_input)?;
        match lease::probe(checkpoints) {
            Ok(()) => {
                let attempt = format!("{}\n{settings}\n{recipe}", env!("CARGO_PKG_VERSION"));
                let (secret, recorded) = (secret.clone(), self.recorded);
                Ok((Some(Failover { secret, attempt, store, recorded }), None))
            }
            // Its workers wait for a lease, and two coordinators must not both go on.
            Err(why) if *again => Err(Failure::run(anyhow!("cannot take over the run: {why}"))),
            Err(why) => Ok((None, Some(format!("the run ends should its coordinator die: {why}")))),
        }
    }
}

/// A run's secret.
struct Found {
    secret: RunSecret,
    /// Whether a coordinator had it before.
    again: bool,
}

async fn serve(
    args: &CoordinatorArgs,
    config: ServerConfig,
    warning: Option<String>,
    out: &mut impl Write,
) -> Result<Exit, Failure> {
    let server = Server::bind(config).await.map_err(|error| match error {
        ServerError::Lease(_) => Failure::run(error),
        error => Failure::bad_input(error),
    })?;
    server.token().write(&args.token_file).map_err(Failure::bad_input)?;
    let (events, mut emitted) = mpsc::channel(QUEUE_MAX);
    let (commands, commanded) = mpsc::channel(QUEUE_MAX);
    if let Some(message) = warning {
        // There is room: nobody else has it yet.
        let _ = events.try_send(Event::Notice { message });
    }
    let listening = tokio::spawn(listen(commands, args.supervised));
    let run = tokio::spawn(server.run(events, commanded));
    while let Some(event) = emitted.recv().await {
        let line = serde_json::to_string(&event).map_err(Failure::internal)?;
        writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Failure::internal)?;
        if matches!(event, Event::RunEnded { .. }) {
            // The token is worth nothing any more, and launchers elsewhere look whether it is there. Nobody takes over from
            // here on: the same command is another attempt.
            let _ = std::fs::remove_file(&args.token_file);
            let _ = std::fs::remove_file(secret_of(&args.out));
        }
    }
    listening.abort();
    let end = run.await.map_err(Failure::internal)?;
    match end.outcome {
        Outcome::Completed(_) => Ok(Exit::Done),
        Outcome::Stopped(_) => Ok(Exit::Interrupted),
        Outcome::BadInput => Err(Failure::bad_input(anyhow!(end.reason))),
        Outcome::WorkerLost(_) | Outcome::Failed => Err(Failure::run(anyhow!(end.reason))),
    }
}

/// Passes on signals, and a launcher's commands; the launcher's end is a stop.
async fn listen(commands: mpsc::Sender<Command>, supervised: bool) {
    let Ok(mut signals) = launch::stop_signals() else { return };
    let mut lines = stdin_lines(supervised);
    loop {
        let command = tokio::select! {
            Some(()) = signals.recv() => Some(Command::Stop),
            Some(line) = lines.recv() => read(&line),
            else => return,
        };
        if let Some(command) = command
            && commands.send(command).await.is_err()
        {
            return;
        }
    }
}

/// The lines of standard input, then a stop; nothing at all without a launcher. A thread reads them, for tokio's own
/// would keep the runtime from ending.
fn stdin_lines(supervised: bool) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(QUEUE_MAX);
    if supervised {
        std::thread::spawn(move || {
            let said = std::io::stdin().lines().map_while(Result::ok);
            for line in said.chain([STOP.to_owned()]) {
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        });
    }
    lines
}

fn read(line: &str) -> Option<Command> {
    match serde_json::from_str(line) {
        Ok(Said::Stop(_)) => Some(Command::Stop),
        Ok(Said::Ping(_)) => Some(Command::Ping),
        Ok(Said::Shrink(workers)) => Some(Command::Shrink(workers)),
        Ok(Said::Exited { host, pid, status, replaced, left }) => {
            let bad_input = status.ends_with(": 2");
            Some(Command::ProcessExited { host, pid, status, bad_input, replaced, left })
        }
        Err(error) => {
            tracing::warn!(%error, %line, "no command of a launcher");
            None
        }
    }
}
