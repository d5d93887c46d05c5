//! One run under a schedule: `mattock train` as a child, its workers and its coordinator as victims.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::audit::{Death, Flip, Harm, workers};
use super::events::{Events, of_kind};
use super::schedule::{Fault, Kind};
use super::stop::Stop;

/// How often the events are looked at.
const PULSE: Duration = Duration::from_millis(5);

/// A run to be started.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This program.
    pub program: PathBuf,
    /// Arguments of `train`, without the folder.
    pub train: Vec<OsString>,
    /// The run's folder.
    pub out: PathBuf,
    /// Of the recipe.
    pub timeout: Duration,
    /// The run must end within this.
    pub limit: Duration,
}

/// What a worker does to itself.
#[derive(Debug, Clone, Copy)]
pub enum Planted {
    /// A bit of its memory flips.
    Flip(Flip),
    /// It dies at a moment of a step, which is not [`Moment::Any`](super::audit::Moment::Any).
    Death(Death),
}

impl Planted {
    /// As processes are told.
    fn fault(&self) -> String {
        match self {
            Self::Flip(Flip { worker, step }) => format!("flip:{worker}:{step}"),
            Self::Death(Death { worker, step, moment }) => {
                format!("{}:{worker}:{step}", format!("{moment:?}").to_lowercase())
            }
        }
    }

    fn worker(&self) -> u64 {
        let (Self::Flip(Flip { worker, .. }) | Self::Death(Death { worker, .. })) = self;
        *worker
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Ended {
    /// How `train` ended.
    pub status: ExitStatus,
    /// All its events.
    pub events: Vec<Value>,
    /// What was done to it.
    pub harm: Harm,
    /// What was done to whom.
    pub said: Vec<String>,
}

/// Runs `train` under a schedule, to its end. What its processes do to themselves is planted in them: a bit that flips, a death at a
/// moment of a step.
///
/// # Errors
/// Where a process cannot be started, its events cannot be read, it does not end in time, or `stop` says so.
pub fn disturb(plan: &Plan, faults: &[Fault], planted: &[Planted], stop: &Stop) -> io::Result<Ended> {
    let mut run = Disturbed::start(plan, planted)?;
    let mut faults = faults.iter().peekable();
    let until = Instant::now() + plan.limit;
    let status = loop {
        stop.check()?;
        let step = of_kind(run.events.read()?, "step").filter_map(|step| step["step"].as_u64()).next_back();
        while let Some(fault) = faults.next_if(|fault| step >= Some(fault.after_step)) {
            sleep(fault.delay);
            run.events.read()?;
            run.strike(fault)?;
        }
        run.wake_the_paused();
        if let Some(status) = run.train.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            return Err(io::Error::other(format!("the run does not end within {:?}", plan.limit)));
        }
        sleep(PULSE);
    };
    run.events.read()?;
    let (events, struck) = (run.events.all().to_vec(), std::mem::take(&mut run.struck));
    let harm = Harm { struck, all_died: run.all_died, ..Harm::default() };
    Ok(Ended { status, events, harm, said: std::mem::take(&mut run.said) })
}

struct Disturbed<'a> {
    plan: &'a Plan,
    train: Child,
    /// Workers that joined from elsewhere.
    joined: Vec<Child>,
    events: Events,
    struck: BTreeSet<u64>,
    paused: Vec<(Instant, Pid)>,
    all_died: bool,
    said: Vec<String>,
}

impl<'a> Disturbed<'a> {
    fn start(plan: &'a Plan, planted: &[Planted]) -> io::Result<Self> {
        let errors = std::fs::File::create(plan.out.with_extension("log"))?;
        let mut command = Command::new(&plan.program);
        if !planted.is_empty() {
            let faults: Vec<String> = planted.iter().map(Planted::fault).collect();
            command.env("MATTOCK_FAULTS", faults.join(","));
        }
        let train = command
            .arg("train")
            .args(&plan.train)
            .args(["--overwrite".as_ref(), "--out".as_ref(), plan.out.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()?;
        let events = Events::of(&plan.out);
        let struck = planted.iter().map(Planted::worker).collect();
        let said = planted.iter().map(|planted| format!("{planted:?}")).collect();
        let (joined, paused) = (Vec::new(), Vec::new());
        Ok(Self { plan, train, joined, events, struck, paused, all_died: false, said })
    }

    /// Workers that have joined and are not known to be gone, with their processes.
    fn living(&self) -> BTreeMap<u64, Pid> {
        let worker = |event: &Value| event["worker"].as_u64();
        let events = self.events.all();
        let gone = of_kind(events, "worker_lost").chain(of_kind(events, "worker_left"));
        let gone: BTreeSet<u64> = gone.filter_map(worker).collect();
        let joined = of_kind(events, "worker_joined").filter_map(|event| {
            let pid = Pid::from_raw(i32::try_from(event["pid"].as_i64()?).ok()?)?;
            Some((worker(event)?, pid))
        });
        joined.filter(|(worker, _)| !gone.contains(worker)).collect()
    }

    /// The process of the newest coordinator.
    fn coordinator(&self) -> Option<Pid> {
        let newest = of_kind(self.events.all(), "listening").next_back()?;
        Pid::from_raw(i32::try_from(newest["pid"].as_i64()?).ok()?)
    }

    fn strike(&mut self, fault: &Fault) -> io::Result<()> {
        let living: Vec<(u64, Pid)> = self.living().into_iter().collect();
        let victim = living.get((fault.victim * living.len() as f64) as usize).copied();
        self.said.push(format!("after step {}: {:?} of {:?}", fault.after_step, fault.kind, victim));
        match (fault.kind, victim) {
            (Kind::Join, _) => self.join()?,
            (Kind::Coordinator, _) => {
                self.coordinator().into_iter().for_each(|pid| signal(pid, Signal::KILL));
            }
            (Kind::CoordinatorHangs, _) => {
                self.coordinator().into_iter().for_each(|pid| signal(pid, Signal::STOP));
            }
            (Kind::KillAll, _) => {
                // Stopped first, so that none of them learns of the others' end.
                living.iter().for_each(|(_, pid)| signal(*pid, Signal::STOP));
                living.iter().for_each(|(_, pid)| signal(*pid, Signal::KILL));
                self.struck.extend(living.iter().map(|(worker, _)| worker));
                self.all_died = true;
            }
            (_, None) => {}
            // The last one's leave would end the run in order.
            (Kind::Leave, _)
                if living.iter().filter(|(worker, _)| !self.struck.contains(worker)).count() < 2 => {}
            (Kind::Pause(part), Some((_, pid))) => {
                signal(pid, Signal::STOP);
                self.paused.push((Instant::now() + self.plan.timeout.mul_f64(part), pid));
            }
            (kind, Some((worker, pid))) => {
                signal(
                    pid,
                    match kind {
                        Kind::Freeze => Signal::STOP,
                        Kind::Leave => Signal::TERM,
                        _ => Signal::KILL,
                    },
                );
                self.struck.insert(worker);
                // Whoever has the state must not be the last one, or it is gone with it.
                let last = of_kind(self.events.all(), "step").next_back();
                let ring = last.map(workers).unwrap_or_default();
                self.all_died |= ring.is_subset(&self.struck);
            }
        }
        Ok(())
    }

    fn join(&mut self) -> io::Result<()> {
        let log =
            std::fs::File::options().create(true).append(true).open(self.plan.out.with_extension("log"))?;
        let worker = Command::new(&self.plan.program)
            .args(["worker", "--device", "cpu", "--token-file"])
            .arg(self.plan.out.join("token"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.joined.push(worker);
        Ok(())
    }

    fn wake_the_paused(&mut self) {
        let now = Instant::now();
        self.paused.retain(|(until, pid)| {
            let over = *until <= now;
            if over {
                signal(*pid, Signal::CONT);
            }
            !over
        });
    }
}

impl Drop for Disturbed<'_> {
    fn drop(&mut self) {
        for child in std::iter::once(&mut self.train).chain(&mut self.joined) {
            // Fails only where it has ended by itself. What `train` has started dies with it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Fails only where the process is gone.
fn signal(pid: Pid, signal: Signal) {
    let _ = kill_process(pid, signal);
}

/// Where a run's log lies that [`disturb`] wrote.
pub fn log_of(out: &Path) -> PathBuf {
    out.with_extension("log")
}
