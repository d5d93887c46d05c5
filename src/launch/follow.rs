//! The workers of one machine of a run whose coordinator is on another.
//!
//! ```text
//! waiting for a token ──> workers run with it ──> all have ended ──> how it ended
//!       ^                        │ nobody was let in with it, or another has taken its place
//!       └────────────────────────┘
//! ```
//!
//! The coordinator writes its join token into the run's folder, which all machines share, and removes it when the run is
//! over. What lies there may be older: the token of an attempt that was killed. So a token is worth what a worker gets for
//! it: as long as nobody was let in, another token takes its place, and the same one is tried again. A coordinator that takes
//! over writes one of the same attempt: workers that are there find it by themselves, others are started with that.
//!
//! # Invariants
//! 1. A worker that dies is replaced, as it is by the coordinator's own launcher.
//! 2. Once a worker was let in, a token that is gone means that the run is over: nobody is started any more.
//! 3. Every wait has a deadline, but for the run itself while a worker is alive.
//! 4. When [`FollowedRun::supervise`] returns, no child is left.
//!
//! Deliberately absent: the run's folder and its events, which belong to the coordinator's launcher.

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mattock_coordinator::identity::JoinToken;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::child::{Notice, Program, Role, Speaks, start};
use super::local::{KILL_TIMEOUT, LaunchError, NOTICES_MAX};
use super::slots::Slots;
use super::worker_environment;
use crate::exit::Exit;

/// How often the token is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// After workers that nobody let in, the next try comes after this long; each time twice as long.
const PAUSE: Duration = Duration::from_secs(1);
/// But not longer than this.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Holds the token of each worker.
const TOKEN_VARIABLE: &str = "MATTOCK_TOKEN";

/// What a worker tells the process that started it, a JSON object a line on its standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum WorkerEvent {
    /// The coordinator has let it in.
    Joined,
    /// It has taken part in a step.
    Stepped,
    /// All steps of the run are done.
    Completed,
    /// The run was stopped on request.
    Stopped,
    /// It was told to leave, and has left.
    Left,
}

/// Where the join token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// A file that the coordinator writes, maybe later.
    File(PathBuf),
    /// Known from the beginning.
    Text(String),
}

impl TokenSource {
    /// The token, if one is there that may be worth something; else why there is none.
    fn read(&self) -> Result<String, String> {
        let token = match self {
            Self::File(path) => JoinToken::read(path),
            Self::Text(text) => JoinToken::parse(text),
        };
        let token = token.map_err(|error| error.to_string())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if now < token.expires { Ok(token.to_string()) } else { Err("it has expired".to_owned()) }
    }
}

impl fmt::Display for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Text(_) => f.write_str(TOKEN_VARIABLE),
        }
    }
}

/// What is to be started on a machine without a coordinator.
pub struct FollowedRun {
    /// How many workers.
    pub workers: NonZeroU32,
    /// Which program each of them runs; its token comes by the environment.
    pub worker: Box<dyn Fn(u32) -> Program>,
    /// What lets them in.
    pub token: TokenSource,
    /// Whether another worker is started in the place of one that has ended.
    pub respawn: bool,
    /// How long somebody has to be let in.
    pub wait: Duration,
    /// From the request to leave until all workers have ended.
    pub stop: Duration,
}

/// How this machine's part ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// All steps of the run are done.
    Completed,
    /// The run was stopped, or this machine left it.
    Stopped,
    /// A worker said that the user's input is at fault.
    BadInput,
    /// Neither, and why.
    Failed(String),
}

impl FollowedRun {
    /// Waits for the token, starts workers, passes on what they say, and returns when all have ended and none is to be
    /// started. The first message on `stops` lets them leave, a second one kills.
    ///
    /// # Errors
    /// Where a process cannot be started, or does not end when it is killed.
    pub async fn supervise(
        self,
        mut stops: mpsc::Receiver<()>,
        mut say: impl FnMut(Option<Role>, &str),
    ) -> Result<Followed, LaunchError> {
        let (sender, mut notices) = mpsc::channel(NOTICES_MAX);
        let mut follower = Follower::new(&self, sender);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        say(None, &format!("waiting for the run's join token ({})", self.token));
        loop {
            let deadline = follower.deadline;
            tokio::select! {
                Some(notice) = notices.recv() => match notice {
                    Notice::Event(role, line) => follower.told(role, &line),
                    Notice::Said(role, line) => say(Some(role), &line),
                    Notice::Exited(role, _, status) => follower.exited(role, status)?,
                },
                Some(()) = stops.recv() => follower.stop(),
                _ = looks.tick() => follower.look(&mut say)?,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => follower.late()?,
            }
            if let Some(ended) = follower.ended() {
                return Ok(ended);
            }
        }
    }
}

/// The workers, and what is known of the run.
struct Follower<'a> {
    run: &'a FollowedRun,
    notices: mpsc::Sender<Notice>,
    kill: watch::Sender<bool>,
    slots: Slots,
    /// What the workers that are there were given.
    token: Option<String>,
    /// Somebody was let in with it.
    joined: bool,
    /// How the first that knew said that the run has ended.
    end: Option<Followed>,
    /// Until then somebody has to be let in.
    patience: Instant,
    /// Before that nobody is started.
    rest: Instant,
    pause: Duration,
    /// What must happen next must happen before this.
    deadline: Option<Instant>,
    leaving: bool,
    /// A worker was told to leave.
    left: bool,
    /// Killed for good.
    killed: bool,
    /// Killed to be started again with another token.
    giving_way: bool,
}

impl<'a> Follower<'a> {
    fn new(run: &'a FollowedRun, notices: mpsc::Sender<Notice>) -> Self {
        let now = Instant::now();
        Self {
            run,
            notices,
            kill: watch::channel(false).0,
            slots: Slots::new(run.workers.get(), run.respawn),
            token: None,
            joined: false,
            end: None,
            patience: now + run.wait,
            rest: now,
            pause: PAUSE,
            deadline: None,
            leaving: false,
            left: false,
            killed: false,
            giving_way: false,
        }
    }

    fn told(&mut self, role: Role, line: &str) {
        let Role::Worker(number) = role else { return };
        match serde_json::from_str(line) {
            Ok(WorkerEvent::Joined) => self.joined = true,
            Ok(WorkerEvent::Stepped) => self.slots.proved(number),
            Ok(WorkerEvent::Completed) => self.end = Some(Followed::Completed),
            Ok(WorkerEvent::Stopped) => {
                self.end.get_or_insert(Followed::Stopped);
            }
            Ok(WorkerEvent::Left) => self.left = true,
            Err(error) => tracing::warn!(%error, %line, "no event of a worker"),
        }
    }

    fn start_all(&mut self, token: String) -> Result<(), LaunchError> {
        self.token = Some(token);
        self.joined = false;
        self.slots.forgive();
        (0..self.run.workers.get()).try_for_each(|number| self.start(number))
    }

    fn start(&mut self, number: u32) -> Result<(), LaunchError> {
        let Some(token) = &self.token else { return Ok(()) };
        let mut program = (self.run.worker)(number).with_env(TOKEN_VARIABLE, token);
        if let Some((name, value)) = worker_environment(self.run.workers) {
            program = program.with_env(name, value);
        }
        let role = Role::Worker(number);
        match start(role, Speaks::Everybody, &program, &self.notices, self.kill.subscribe()) {
            Ok((pid, stdin)) => self.slots.fill(number, pid, stdin),
            // Those that are there end with their standard input, and are killed when they are dropped.
            Err(source) => return Err(LaunchError::not_started(role, &program, source)),
        }
        Ok(())
    }

    fn exited(&mut self, role: Role, status: ExitStatus) -> Result<(), LaunchError> {
        let Role::Worker(number) = role else { return Ok(()) };
        let wanted = self.slots.ended(number, status);
        if status.code() == Some(Exit::BadInput as i32) {
            self.end.get_or_insert(Followed::BadInput);
        }
        let over = self.leaving || self.killed || self.is_over();
        // Nobody was let in: whether the token is the right one is seen when all have tried.
        if wanted && !over && self.joined && self.is_current() {
            self.start(number)?;
        }
        if !self.slots.has_any() {
            self.all_gone();
        } else if self.is_over() {
            self.deadline.get_or_insert_with(|| Instant::now() + self.run.stop);
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        matches!(self.end, Some(Followed::Completed | Followed::Stopped))
    }

    /// Whether the token of the workers that are there is the one in its place; or that of a coordinator that took over, which
    /// is taken from here on.
    fn is_current(&mut self) -> bool {
        let parse = |text: &str| JoinToken::parse(text).ok();
        let (there, ours) = (self.run.token.read().ok(), self.token.as_deref().and_then(parse));
        let found = there.as_deref().and_then(parse);
        let same = found.zip(ours).is_some_and(|(found, ours)| found.is_of_same_attempt(&ours));
        if same {
            self.token = there;
        }
        same
    }

    /// What follows when no worker is left.
    fn all_gone(&mut self) {
        if self.leaving || self.killed || self.left {
            self.end.get_or_insert(Followed::Stopped);
        } else if self.end.is_none() {
            let there = self.run.token.read().ok();
            let replaced = there.is_some() && there != self.token;
            if self.joined && !replaced {
                let why = match there {
                    Some(_) => {
                        "its workers ended one after the other, each before a step was done".to_owned()
                    }
                    None => "the run is over, and was not completed".to_owned(),
                };
                self.end =
                    Some(Followed::Failed(format!("{why}: what they said is above, and at the coordinator")));
                return;
            }
            if replaced {
                self.patience = Instant::now() + self.run.wait;
                self.pause = PAUSE;
            } else {
                self.rest = Instant::now() + self.pause;
                self.pause = (2 * self.pause).min(PAUSE_MAX);
            }
            self.token = None;
            self.kill = watch::channel(false).0;
            (self.deadline, self.giving_way) = (None, false);
        }
    }

    /// Looks at the token, and starts, waits on, or gives way to another.
    fn look(&mut self, say: &mut impl FnMut(Option<Role>, &str)) -> Result<(), LaunchError> {
        if self.leaving || self.killed || self.end.is_some() || self.joined {
            return Ok(());
        }
        let now = Instant::now();
        if self.slots.has_any() {
            let other = self.run.token.read().is_ok_and(|token| Some(&token) != self.token.as_ref());
            if other && !self.giving_way {
                self.giving_way = true;
                say(None, "another join token has taken the place of the one that was tried");
                self.kill.send_replace(true);
                self.deadline = Some(now + KILL_TIMEOUT);
            }
            return Ok(());
        }
        match self.run.token.read() {
            token if now >= self.patience => {
                self.give_up(&token.err().unwrap_or_else(|| "nobody was let in with it".to_owned()));
            }
            Ok(token) if now >= self.rest => {
                say(None, "found a join token: starting workers");
                self.start_all(token)?;
            }
            Ok(_) | Err(_) => {}
        }
        Ok(())
    }

    fn give_up(&mut self, lacks: &str) {
        let (source, wait) = (&self.run.token, self.run.wait);
        self.end = Some(Followed::Failed(format!(
            "no run to join within {wait:?}: the join token ({source}) is of no use: {lacks}; is node 0 up, and is its \
             --out the same folder as here?"
        )));
    }

    fn stop(&mut self) {
        if self.leaving {
            self.kill_all();
            return;
        }
        self.leaving = true;
        for pid in self.slots.processes() {
            if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                // Fails only where it has ended by itself.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        self.deadline = Some(Instant::now() + self.run.stop);
        if !self.slots.has_any() {
            self.all_gone();
        }
    }

    fn kill_all(&mut self) {
        self.killed = true;
        self.kill.send_replace(true);
        self.deadline = Some(Instant::now() + KILL_TIMEOUT);
    }

    fn late(&mut self) -> Result<(), LaunchError> {
        if self.killed || self.giving_way {
            let pids = self.slots.living().map(|number| Role::Worker(number).to_string()).collect();
            return Err(LaunchError::Undead { pids });
        }
        self.kill_all();
        Ok(())
    }

    /// How it ended, once it has.
    fn ended(&self) -> Option<Followed> {
        self.end.clone().filter(|_| !self.slots.has_any())
    }
}
