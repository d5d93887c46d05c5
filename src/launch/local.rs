//! A run on this machine: one coordinator and its workers as child processes, watched until all are gone.
//!
//! ```text
//!                 JSON commands                      JSON events, one a line
//! supervisor ──────── stdin ────────> coordinator ──────── stdout ────────> supervisor
//!      └── starts workers once the coordinator listens; tells it of every worker that exits, and starts another
//! ```
//!
//! A worker that the coordinator calls lost is killed, should it still be there: a stopped one would wake up one day. A
//! coordinator that dies before the run is over is started again: it takes over, and the workers come back to it.
//!
//! # Invariants
//! 1. A worker's exit is told to the coordinator at once: no heartbeat has to time out for it.
//! 2. Every wait has a deadline, but for the run itself while the coordinator and a worker are alive.
//! 3. When [`LocalRun::supervise`] returns, no child is left.
//!
//! Deliberately absent: any opinion on whether the run went well. The events say that, and the
//! coordinator's exit status.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::process::ExitStatus;
use std::time::Duration;
use std::{fmt, io};

use mattock_worker::host;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::child::{Notice, Program, Role, Speaks, start};
use super::deadlines::Deadlines;
use super::scale::Scale;
use super::slots::Slots;
use super::successor::Successor;
use super::watchdog::{Look, Watchdog};
use super::worker_environment;

/// Notices that wait to be handled; a child that prints faster than we can pass on is held up.
pub(super) const NOTICES_MAX: usize = 256;
/// How long the coordinator may take to read a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the system may take to end a killed process.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Last words of the coordinator in an error.
const LAST_WORDS_MAX: usize = 5;

/// The coordinator's first event, `{"event":"listening","address":"127.0.0.1:4433"}`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Listening {
    /// Where workers reach it.
    pub address: SocketAddr,
}

/// Names the program of a worker, given its number, for a coordinator that listens.
pub type WorkerProgram = Box<dyn Fn(u32, &Listening) -> Program>;

/// The coordinator's answer to whoever asks whether it lives; nobody else needs to know.
const ALIVE: &str = r#"{"event":"alive"}"#;

/// What is to be started.
pub struct LocalRun {
    /// The coordinator.
    pub coordinator: Program,
    /// How many workers.
    pub workers: NonZeroU32,
    /// Which program each of them runs.
    pub worker: WorkerProgram,
    /// Whether another worker is started in the place of one that has ended.
    pub respawn: bool,
    /// How often in a row, without a step in between, a coordinator that has died is started again.
    pub restarts: u32,
    /// How long each ending is waited for.
    pub deadlines: Deadlines,
}

impl fmt::Debug for LocalRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalRun")
            .field("coordinator", &self.coordinator)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

/// What the supervisor looks for in the coordinator's events.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Seen {
    Listening(Listening),
    WorkerJoined {
        worker: u64,
        /// Other hosts may have a process of that number too.
        host: Option<String>,
        pid: u32,
    },
    RunStarted {
        #[serde(default)]
        resumed_from: u64,
    },
    WorkerLost {
        worker: u64,
    },
    WorkerLeft {
        worker: u64,
    },
    Superseded,
    ScaleRequested {
        wanted: u32,
        there: u32,
    },
    Step {
        #[serde(default)]
        step: u64,
        ranks: Vec<SeenRank>,
    },
    RunEnding,
    RunEnded,
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct SeenRank {
    worker: u64,
}

/// What the children print, as it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line<'a> {
    /// An event of the coordinator, as JSON; `listening` included.
    Event(&'a str),
    /// A line on a child's standard error.
    Said(Role, &'a str),
}

/// How the processes ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The coordinator's status.
    pub coordinator: ExitStatus,
    /// The status of the last worker of each number; none where it was never started.
    pub workers: Vec<Option<ExitStatus>>,
    /// Somebody asked the run to stop.
    pub stopped: bool,
    /// Some had to be killed, and why.
    pub killed: Option<&'static str>,
}

/// Why processes could not be started or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The system refuses to start it.
    #[error("cannot start {role} ({program}): {source}")]
    Start {
        /// Which child.
        role: Role,
        /// Its executable.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// The coordinator ended, or said nothing in time, before any worker could be started.
    #[error("the coordinator did not come to listen: {why}")]
    NeverListened {
        /// How it ended, and its last words.
        why: String,
        /// Its exit code, where it ended by itself.
        code: Option<i32>,
    },
    /// A killed process is still there.
    #[error("processes {pids:?} are still there {KILL_TIMEOUT:?} after being killed: look at them with ps")]
    Undead {
        /// Their process ids.
        pids: Vec<String>,
    },
}

impl LaunchError {
    pub(super) fn not_started(role: Role, program: &Program, source: io::Error) -> Self {
        Self::Start { role, program: program.path.display().to_string(), source }
    }
}

impl LocalRun {
    /// Starts everything, passes on what is printed, and returns when all have ended. The first message on
    /// `stops` ends the run in order, a second one kills.
    ///
    /// # Errors
    /// Where a process can't be started, or the coordinator never listens. No child is left then either.
    pub async fn supervise(
        self,
        mut stops: mpsc::Receiver<()>,
        mut on_line: impl FnMut(Line<'_>),
    ) -> Result<Ended, LaunchError> {
        let (sender, mut notices) = mpsc::channel(NOTICES_MAX);
        let mut watched = Supervisor::start(&self, sender)?;
        loop {
            let deadline = watched.deadline;
            tokio::select! {
                Some(notice) = notices.recv() => match notice {
                    Notice::Event(_, line) => {
                        watched.watchdog.answered();
                        if line == ALIVE {
                            continue;
                        }
                        on_line(Line::Event(&line));
                        watched.event(&line).await;
                    }
                    Notice::Said(role, line) => {
                        on_line(Line::Said(role, &line));
                        watched.said(role, line);
                    }
                    Notice::Exited(role, pid, status) => watched.exited(role, pid, status).await,
                },
                Some(()) = stops.recv() => watched.stop().await,
                () = watched.watchdog.due() => if let Some(said) = watched.look_at_coordinator().await {
                    on_line(Line::Said(Role::Coordinator, &said));
                },
                () = sleep_until(watched.successor.at()), if watched.successor.is_due() => {
                    let said = watched.start_successor();
                    on_line(Line::Said(Role::Coordinator, &said));
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => watched.late()?,
            }
            if let Some(ended) = watched.ended() {
                return ended;
            }
        }
    }
}

/// The children, and how far the run is.
struct Supervisor<'a> {
    run: &'a LocalRun,
    notices: mpsc::Sender<Notice>,
    kill: watch::Sender<bool>,
    /// What must happen next must happen before this.
    deadline: Option<Instant>,
    listening: Option<Listening>,
    stopped: bool,
    /// The coordinator has said that the run is over,
    over: bool,
    /// and how it ended.
    told_end: bool,
    killed: Option<&'static str>,
    /// Returned once all are gone.
    failed: Option<LaunchError>,
    coordinator: Option<ExitStatus>,
    coordinator_stdin: Option<ChildStdin>,
    coordinator_pid: u32,
    watchdog: Watchdog,
    successor: Successor,
    workers: Slots,
    scale: Scale,
    last_words: VecDeque<String>,
}

impl<'a> Supervisor<'a> {
    fn start(run: &'a LocalRun, notices: mpsc::Sender<Notice>) -> Result<Self, LaunchError> {
        let (kill, killed) = watch::channel(false);
        let (pid, stdin) = start(Role::Coordinator, Speaks::Coordinator, &run.coordinator, &notices, killed)
            .map_err(|source| LaunchError::not_started(Role::Coordinator, &run.coordinator, source))?;
        Ok(Self {
            run,
            notices,
            kill,
            deadline: Some(Instant::now() + run.deadlines.start),
            listening: None,
            stopped: false,
            over: false,
            told_end: false,
            killed: None,
            failed: None,
            coordinator: None,
            coordinator_stdin: Some(stdin),
            coordinator_pid: pid,
            watchdog: Watchdog::new(run.deadlines.silence),
            successor: Successor::new(run.restarts),
            workers: Slots::new(run.workers.get(), run.respawn),
            scale: Scale::default(),
            last_words: VecDeque::new(),
        })
    }

    async fn event(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Seen::Listening(listening)) if self.listening.is_some() => {
                self.listening = Some(listening);
                // Training has its own deadlines; a stop's goes on.
                self.deadline = self.deadline.filter(|_| self.stopped);
                for command in self.successor.listens() {
                    self.command(&command).await;
                }
                if let Some(wanted) = self.scale.unmet() {
                    self.command(&json!({ "shrink": wanted })).await;
                }
                if self.stopped {
                    self.command(&json!({ "stop": true })).await;
                }
            }
            Ok(Seen::Listening(listening)) if self.listening.is_none() && !self.stopped => {
                self.listening = Some(listening);
                self.deadline = self.run.deadlines.gather.map(|gather| Instant::now() + gather);
                (0..self.run.workers.get()).for_each(|number| self.start_worker(number));
            }
            Ok(Seen::WorkerJoined { worker, host, pid }) => {
                self.workers.joined(pid, host.is_none_or(|host| host == host::name()), worker);
            }
            Ok(Seen::RunStarted { resumed_from }) => {
                self.successor.recorded(resumed_from);
                self.deadline = self.deadline.filter(|_| self.stopped);
            }
            Ok(Seen::Superseded) => self.successor.give_up(),
            Ok(Seen::WorkerLost { worker }) => {
                self.kill_worker(worker);
                self.gone(worker);
            }
            Ok(Seen::WorkerLeft { worker }) => self.gone(worker),
            Ok(Seen::ScaleRequested { wanted, there }) => self.scale_to(wanted, there).await,
            Ok(Seen::Step { step, ranks }) => {
                self.successor.recorded(step);
                self.scale.stepped(ranks.len() as u32);
                self.workers.stepped(&ranks.into_iter().map(|rank| rank.worker).collect());
            }
            Ok(Seen::RunEnding) => {
                self.over = true;
                if !self.workers.has_any() {
                    self.wait_at_most(self.run.deadlines.exit);
                }
            }
            Ok(Seen::RunEnded) => self.told_end = true,
            Ok(Seen::Listening(_) | Seen::Other) | Err(_) => {}
        }
    }

    fn start_worker(&mut self, number: u32) {
        let Some(listening) = &self.listening else { return };
        let role = Role::Worker(number);
        let mut program = (self.run.worker)(number, listening);
        let workers = NonZeroU32::new(self.workers.count()).unwrap_or(self.run.workers);
        if let Some((name, value)) = worker_environment(workers) {
            program = program.with_env(name, value);
        }
        match start(role, Speaks::Coordinator, &program, &self.notices, self.kill.subscribe()) {
            Ok((pid, stdin)) => self.workers.fill(number, pid, stdin),
            Err(source) => {
                self.failed.get_or_insert(LaunchError::not_started(role, &program, source));
                self.kill_all("a worker could not be started");
            }
        }
    }

    /// The run is to have so many workers, on whatever machine. Who is too many and has joined is sent away by the coordinator.
    async fn scale_to(&mut self, wanted: u32, there: u32) {
        if self.over || self.stopped || self.killed.is_some() {
            return;
        }
        let starting: Vec<(u32, u32)> = self.workers.starting().collect();
        let change = self.scale.request(wanted, there, starting.len() as u32);
        for &(number, pid) in starting.iter().rev().take(change.take_back as usize) {
            self.workers.dismiss(number);
            kill(pid);
        }
        for _ in 0..change.start {
            let number = self.workers.open();
            self.start_worker(number);
        }
        self.command(&json!({ "shrink": wanted })).await;
    }

    /// Kills a worker that the run goes on without; its end is noticed as any other.
    fn kill_worker(&self, worker: u64) {
        self.workers.process_of(worker).into_iter().for_each(kill);
    }

    /// A worker takes part no more. Where it was the last, the run is about to end.
    fn gone(&mut self, worker: u64) {
        self.workers.gone(worker);
        if self.workers.all_gone() && !self.has_others() && self.coordinator.is_none() {
            self.wait_at_most(self.run.deadlines.exit);
        }
    }

    fn said(&mut self, role: Role, line: String) {
        if role == Role::Coordinator && self.listening.is_none() {
            self.last_words.push_back(line);
            if self.last_words.len() > LAST_WORDS_MAX {
                self.last_words.pop_front();
            }
        }
    }

    async fn exited(&mut self, role: Role, pid: u32, status: ExitStatus) {
        match role {
            Role::Coordinator => {
                self.coordinator_stdin = None;
                let wanted = self.listening.is_some() && !self.told_end && self.killed.is_none();
                if wanted && self.successor.is_wanted(status) {
                    self.over = false;
                    return;
                }
                self.coordinator = Some(status);
                if self.told_end && status.code().is_none() {
                    // It may not have told the workers, and nobody else comes who would.
                    self.kill_all("the coordinator died when the run was over");
                }
                // Without a coordinator there is no run: the end of their standard input tells the workers.
                self.workers.close_stdins();
                self.wait_at_most(self.run.deadlines.exit);
            }
            Role::Worker(number) => {
                let wanted = self.workers.ended(number, status);
                let over = self.over || self.stopped || self.killed.is_some() || self.coordinator.is_some();
                let replaced = wanted && !over;
                let left = self.workers.living().count() + usize::from(replaced);
                let status = status.to_string();
                let host = host::name();
                let exited =
                    json!({ "host": host, "pid": pid, "status": status, "replaced": replaced, "left": left });
                self.tell(json!({ "exited": exited })).await;
                if replaced {
                    self.start_worker(number);
                } else if self.workers.all_gone() && !self.has_others() && self.coordinator.is_none() {
                    self.wait_at_most(self.run.deadlines.exit);
                }
            }
        }
    }

    /// Asks the coordinator whether it lives, and kills one that has not answered for too long: another takes over. Returns
    /// what is to be said of it.
    async fn look_at_coordinator(&mut self) -> Option<String> {
        // Whose end, or beginning, is awaited has a deadline of its own.
        let awaited = self.listening.is_none() || self.successor.is_starting() || self.over;
        if awaited || self.coordinator.is_some() || self.killed.is_some() {
            self.watchdog.answered();
            return None;
        }
        match self.watchdog.look() {
            Look::Ask => self.command(&json!({ "ping": true })).await,
            Look::Wait => {}
            Look::GiveUp => {
                self.watchdog.answered();
                kill(self.coordinator_pid);
                return Some(format!(
                    "it has not answered for {:?}: it is killed",
                    self.run.deadlines.silence
                ));
            }
        }
        None
    }

    /// Starts another coordinator in the place of the dead one; returns what is to be said of it.
    fn start_successor(&mut self) -> String {
        let port = self.listening.as_ref().map(|listening| listening.address.port());
        let (program, said) = self.successor.program(&self.run.coordinator, port);
        let kill = self.kill.subscribe();
        match start(Role::Coordinator, Speaks::Coordinator, &program, &self.notices, kill) {
            Ok((pid, stdin)) => {
                (self.coordinator_stdin, self.coordinator_pid) = (Some(stdin), pid);
                self.wait_at_most(self.run.deadlines.start);
                said
            }
            Err(source) => {
                let error = LaunchError::not_started(Role::Coordinator, &program, source);
                let said = error.to_string();
                self.coordinator = Some(self.successor.status());
                self.failed.get_or_insert(error);
                self.kill_all("the coordinator could not be started again");
                said
            }
        }
    }

    async fn stop(&mut self) {
        if self.stopped {
            self.kill_all("a second signal");
            return;
        }
        self.stopped = true;
        self.command(&json!({ "stop": true })).await;
        self.wait_at_most(self.run.deadlines.stop);
    }

    fn late(&mut self) -> Result<(), LaunchError> {
        if self.killed.is_some() {
            return Err(LaunchError::Undead { pids: self.living() });
        }
        self.kill_all(match (self.coordinator.is_some(), self.stopped, self.listening.is_some()) {
            (true, ..) => "workers did not end after the coordinator",
            (_, true, _) => "the run did not stop in time",
            (_, _, false) => "the coordinator did not come to listen in time",
            _ if self.has_others() && self.workers.living().next().is_some() => {
                "the workers of the other machines did not come in time: look at what those say, or wait longer (--wait)"
            }
            (..) => "the coordinator did not end after the last worker",
        });
        Ok(())
    }

    /// Whether workers of other machines take part, who go on without those here.
    fn has_others(&self) -> bool {
        self.run.deadlines.gather.is_some()
    }

    fn kill_all(&mut self, why: &'static str) {
        self.killed = Some(why);
        self.kill.send_replace(true);
        self.deadline = Some(Instant::now() + KILL_TIMEOUT);
    }

    /// Brings the deadline forward, never back.
    fn wait_at_most(&mut self, wait: Duration) {
        let deadline = Instant::now() + wait;
        self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    /// Tells the coordinator, or the one that takes its place.
    async fn tell(&mut self, command: serde_json::Value) {
        match self.coordinator_stdin.is_some() && !self.successor.is_starting() {
            true => self.command(&command).await,
            false => self.successor.tell_later(command),
        }
    }

    /// Tells the coordinator. Where it doesn't take it, its exit is noticed elsewhere, or a deadline passes.
    async fn command(&mut self, command: &serde_json::Value) {
        if let Some(stdin) = &mut self.coordinator_stdin {
            let line = format!("{command}\n");
            let _ = timeout(COMMAND_TIMEOUT, stdin.write_all(line.as_bytes())).await;
        }
    }

    fn living(&self) -> Vec<String> {
        let coordinator = self.coordinator.is_none().then_some(Role::Coordinator);
        coordinator
            .into_iter()
            .chain(self.workers.living().map(Role::Worker))
            .map(|role| role.to_string())
            .collect()
    }

    /// How it ended, once all have.
    fn ended(&mut self) -> Option<Result<Ended, LaunchError>> {
        let coordinator = self.coordinator?;
        if self.workers.living().next().is_some() {
            return None;
        }
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        if self.listening.is_none() && !self.stopped {
            let words = Vec::from_iter(self.last_words.drain(..)).join("\n");
            let how = self.killed.map_or_else(|| coordinator.to_string(), str::to_owned);
            return Some(Err(LaunchError::NeverListened {
                why: format!("{how}\n{words}").trim_end().to_owned(),
                code: coordinator.code(),
            }));
        }
        Some(Ok(Ended {
            coordinator,
            workers: self.workers.statuses(),
            stopped: self.stopped,
            killed: self.killed,
        }))
    }
}

/// Fails only where it has ended by itself.
fn kill(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
