//! One child process: started, listened to, waited for. What happens to it arrives as [`Notice`]s on a
//! channel.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::lines::next_line;
use super::{PARENT, SECRET_VARIABLE};

/// Of a line on standard error.
const STDERR_LINE_BYTES_MAX: usize = 4096;
/// Of a child's lines on standard error.
const STDERR_LINES_MAX: usize = 100_000;
/// Of an event: some hundred bytes for each of thousands of ranks.
const EVENT_BYTES_MAX: usize = 8 << 20;
/// How long a dead child's last words are waited for; a grandchild may hold its pipes open.
const DRAIN: Duration = Duration::from_millis(500);
/// As if it had ended with 255: where the system lost its status.
const STATUS_UNKNOWN: i32 = 255 << 8;

/// A program to start.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments; secrets go by file or environment.
    pub args: Vec<OsString>,
    /// Added to this process's environment.
    pub env: Vec<(OsString, OsString)>,
}

impl Program {
    /// This executable with other arguments.
    ///
    /// # Errors
    /// Where the system doesn't say which one this is.
    pub fn this<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> io::Result<Self> {
        let args = args.into_iter().map(Into::into).collect();
        Ok(Self { path: std::env::current_exe()?, args, env: Vec::new() })
    }

    /// With one more variable in its environment.
    #[must_use]
    pub fn with_env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }
}

/// Which child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The run's only coordinator.
    Coordinator,
    /// A worker, counted from 0.
    Worker(u32),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("coordinator"),
            Self::Worker(number) => write!(f, "worker {number}"),
        }
    }
}

/// What happens to children.
#[derive(Debug)]
pub(super) enum Notice {
    /// A line on the standard output.
    Event(Role, String),
    /// A line on standard error.
    Said(Role, String),
    /// Nothing of it is left, and everything that it printed has been reported.
    Exited(Role, u32, ExitStatus),
}

/// Whose standard output holds events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speaks {
    /// The coordinator, for all.
    Coordinator,
    /// Each worker, for there is no coordinator here.
    Everybody,
}

/// Starts a program; `kill` becoming true kills it. Returns its process id and its standard input,
/// which ends when dropped.
pub(super) fn start(
    role: Role,
    speaks: Speaks,
    program: &Program,
    notices: &mpsc::Sender<Notice>,
    kill: watch::Receiver<bool>,
) -> io::Result<(u32, ChildStdin)> {
    let heard = role == Role::Coordinator || speaks == Speaks::Everybody;
    let mut command = Command::new(&program.path);
    command
        .args(&program.args)
        .envs(program.env.iter().map(|(name, value)| (name, value)))
        .env(PARENT, std::process::id().to_string())
        .stdin(Stdio::piped())
        .stdout(if heard { Stdio::piped() } else { Stdio::null() })
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if role != Role::Coordinator {
        command.env_remove(SECRET_VARIABLE);
    }
    // A group of its own: Ctrl-C on the terminal reaches the parent alone, which then stops the run in order.
    command.process_group(0);
    let mut child = command.spawn()?;
    let pid = child.id().unwrap_or_default();
    let stdin = child.stdin.take().ok_or_else(|| io::Error::other("no standard input"))?;
    let mut readers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        readers.push(tokio::spawn(pass_events(role, stdout, notices.clone())));
    }
    if let Some(stderr) = child.stderr.take() {
        readers.push(tokio::spawn(pass_stderr(role, stderr, notices.clone())));
    }
    tokio::spawn(wait(role, pid, child, readers, notices.clone(), kill));
    Ok((pid, stdin))
}

async fn wait(
    role: Role,
    pid: u32,
    mut child: Child,
    readers: Vec<JoinHandle<()>>,
    notices: mpsc::Sender<Notice>,
    mut kill: watch::Receiver<bool>,
) {
    // An error says that the supervisor is gone, which means the same.
    let killed = async { drop(kill.wait_for(|kill| *kill).await) };
    let status = tokio::select! {
        status = child.wait() => status,
        () = killed => {
            // Fails only where it has ended by itself.
            let _ = child.start_kill();
            child.wait().await
        }
    };
    let status = status.unwrap_or(ExitStatus::from_raw(STATUS_UNKNOWN));
    for mut reader in readers {
        if timeout(DRAIN, &mut reader).await.is_err() {
            reader.abort();
        }
    }
    // Nobody listens any more only where the supervisor has given up.
    let _ = notices.send(Notice::Exited(role, pid, status)).await;
}

async fn pass_events(role: Role, stdout: impl AsyncRead + Unpin, notices: mpsc::Sender<Notice>) {
    let mut reader = BufReader::new(stdout);
    while let Ok(Some(line)) = next_line(&mut reader, EVENT_BYTES_MAX).await {
        let notice = if line.cut {
            let said = format!("an event of more than {EVENT_BYTES_MAX} bytes was dropped");
            Notice::Said(role, said)
        } else {
            Notice::Event(role, line.text)
        };
        if notices.send(notice).await.is_err() {
            return;
        }
    }
}

async fn pass_stderr(role: Role, stderr: impl AsyncRead + Unpin, notices: mpsc::Sender<Notice>) {
    let mut reader = BufReader::new(stderr);
    let mut lines = 0;
    while let Ok(Some(line)) = next_line(&mut reader, STDERR_LINE_BYTES_MAX).await {
        lines += 1;
        let text = match lines {
            ..=STDERR_LINES_MAX if line.cut => format!("{} ...", line.text),
            ..=STDERR_LINES_MAX => line.text,
            _ if lines == STDERR_LINES_MAX + 1 => "what else it says is left out".to_owned(),
            // Still read, so that the child is not blocked on a full pipe.
            _ => continue,
        };
        if notices.send(Notice::Said(role, text)).await.is_err() {
            return;
        }
    }
}
