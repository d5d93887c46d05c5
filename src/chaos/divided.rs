//! One run on several hosts, whose ways to each other are cut and healed: a coordinator on host 0, a worker on each other.
//!
//! No launcher is there: a worker that the coordinator gives up is killed and another started on its host, as one that ends is.
//! Cuts come one at a time, each once the ring is whole and trains. When the last has healed the run is stopped in order.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::audit::Harm;
use super::events::{Events, of_kind};
use super::hosts::Hosts;
use super::partitions::Cut;
use super::stop::Stop;

/// How often the events are looked at.
const PULSE: Duration = Duration::from_millis(5);
/// Between two processes on one host.
const RESPAWN: Duration = Duration::from_millis(200);
/// Steps between one cut and the next.
const CALM: u64 = 3;
/// A host's worker that leaves with this code has input that none can use.
const BAD_INPUT: i32 = 2;

/// A run to be started.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This program.
    pub program: PathBuf,
    /// The resolved recipe.
    pub recipe: String,
    /// The run's folder; what it holds is removed.
    pub out: PathBuf,
    /// Workers, one on each host.
    pub workers: usize,
    /// Of the recipe.
    pub timeout: Duration,
    /// The run must end within this.
    pub limit: Duration,
}

/// What came of a run.
#[derive(Debug)]
pub struct Ended {
    /// All its events.
    pub events: Vec<Value>,
    /// What was done to it: struck are workers on whose hosts a cut lasted longer than the timeout.
    pub harm: Harm,
    /// Rings that were formed while all cuts healed in time; one, where none was noticed.
    pub rings_of_short: usize,
    /// What was cut.
    pub said: Vec<String>,
}

/// Runs a run under these cuts, and until it has done `least` steps.
///
/// # Errors
/// Where a process cannot be started, a ring is not whole again in time, a cut that healed in time was noticed, the run ends
/// early, or `stop` says so. Hosts and processes are gone then, too.
pub fn divide(plan: &Plan, cuts: &[Cut], least: u64, stop: &Stop) -> io::Result<Ended> {
    let mut run = Divided::start(plan, stop)?;
    run.wait_for_calm(CALM)?;
    for cut in cuts {
        run.suffer(cut)?;
    }
    while run.step() < least {
        run.pulse()?;
    }
    run.stop()?;
    let rings_of_short = run.rings_of_short.unwrap_or_else(|| run.rings());
    let (struck, said) = (std::mem::take(&mut run.struck), std::mem::take(&mut run.said));
    let harm = Harm { struck, ..Harm::default() };
    Ok(Ended { events: run.events.all().to_vec(), harm, rings_of_short, said })
}

struct Place {
    worker: Option<Child>,
    started: Instant,
}

struct Divided<'a> {
    plan: &'a Plan,
    stop: &'a Stop,
    until: Instant,
    coordinator: Child,
    places: Vec<Place>,
    events: Events,
    /// Events that were looked at for who is lost.
    heeded: usize,
    struck: BTreeSet<u64>,
    rings_of_short: Option<usize>,
    said: Vec<String>,
    // Last: processes end before their hosts.
    hosts: Hosts,
}

impl<'a> Divided<'a> {
    fn start(plan: &'a Plan, stop: &'a Stop) -> io::Result<Self> {
        if plan.out.exists() {
            std::fs::remove_dir_all(&plan.out)?;
        }
        std::fs::create_dir_all(&plan.out)?;
        let recipe = plan.out.join("recipe.toml");
        std::fs::write(&recipe, &plan.recipe)?;
        let hosts = Hosts::up(plan.workers + 1)?;
        let arguments: [OsString; 10] = [
            "coordinator".into(),
            recipe.into(),
            "--out".into(),
            plan.out.clone().into(),
            "--listen".into(),
            format!("{}:0", Hosts::address(0)).into(),
            "--token-file".into(),
            plan.out.join("token").into(),
            "--workers".into(),
            plan.workers.to_string().into(),
        ];
        let coordinator = hosts
            .command(0, &plan.program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(plan.out.join("events.jsonl"))?)
            .stderr(File::create(super::disturb::log_of(&plan.out))?)
            .spawn()?;
        let (events, until) = (Events::of(&plan.out), Instant::now() + plan.limit);
        let (places, struck, said) = (Vec::new(), BTreeSet::new(), Vec::new());
        let (heeded, rings_of_short) = (0, None);
        let mut run = Self {
            plan,
            stop,
            until,
            coordinator,
            places,
            events,
            heeded,
            struck,
            rings_of_short,
            said,
            hosts,
        };
        while !plan.out.join("token").exists() {
            run.look()?;
        }
        for host in 1..=plan.workers {
            let worker = Some(run.worker(host)?);
            run.places.push(Place { worker, started: Instant::now() });
        }
        Ok(run)
    }

    fn worker(&self, host: usize) -> io::Result<Child> {
        let log = File::options().append(true).open(super::disturb::log_of(&self.plan.out))?;
        let mut command = self.hosts.command(host, &self.plan.program);
        command.args(["worker", "--device", "cpu", "--token-file"]).arg(self.plan.out.join("token"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()
    }

    /// Reads what is new, and waits a little.
    fn look(&mut self) -> io::Result<Option<ExitStatus>> {
        sleep(PULSE);
        self.stop.check()?;
        self.events.read()?;
        if Instant::now() >= self.until {
            return Err(self.failure(&format!("the run does not end within {:?}", self.plan.limit)));
        }
        self.coordinator.try_wait()
    }

    /// As [`Self::look`], and sees to it that each host has a worker.
    fn pulse(&mut self) -> io::Result<()> {
        if let Some(status) = self.look()? {
            return Err(self.failure(&format!("the coordinator ended early ({status})")));
        }
        self.bury();
        for index in 0..self.places.len() {
            let place = &mut self.places[index];
            if let Some(status) = place.worker.as_mut().map_or(Ok(None), Child::try_wait)? {
                if status.code() == Some(BAD_INPUT) && self.step() == 0 {
                    return Err(self.failure("a worker cannot use its input"));
                }
                self.places[index].worker = None;
            }
            if self.places[index].worker.is_none() && self.places[index].started.elapsed() >= RESPAWN {
                let worker = self.worker(index + 1)?;
                self.places[index] = Place { worker: Some(worker), started: Instant::now() };
            }
        }
        Ok(())
    }

    /// Kills those that the coordinator has given up.
    fn bury(&mut self) {
        let all = self.events.all();
        let lost: Vec<u64> = of_kind(&all[self.heeded..], "worker_lost")
            .filter_map(|event| event["worker"].as_u64())
            .collect();
        let pids: Vec<u64> = of_kind(all, "worker_joined")
            .filter(|event| event["worker"].as_u64().is_some_and(|worker| lost.contains(&worker)))
            .filter_map(|event| event["pid"].as_u64())
            .collect();
        self.heeded = all.len();
        for worker in self.places.iter_mut().filter_map(|place| place.worker.as_mut()) {
            if pids.contains(&u64::from(worker.id())) {
                // Fails only where it has ended by itself; that is noticed next.
                let _ = worker.kill();
            }
        }
    }

    fn step(&self) -> u64 {
        of_kind(self.events.all(), "step").filter_map(|step| step["step"].as_u64()).next_back().unwrap_or(0)
    }

    fn rings(&self) -> usize {
        of_kind(self.events.all(), "ring_formed").count()
    }

    /// Waits until a ring of all has done so many steps from now on.
    fn wait_for_calm(&mut self, steps: u64) -> io::Result<()> {
        let seen = self.events.all().len();
        let world = Some(self.plan.workers as u64);
        loop {
            self.pulse()?;
            let new = self.events.all().get(seen..).unwrap_or_default();
            let whole = of_kind(new, "step").rev().take_while(|step| step["world_size"].as_u64() == world);
            if whole.count() as u64 >= steps {
                return Ok(());
            }
        }
    }

    fn suffer(&mut self, cut: &Cut) -> io::Result<()> {
        let rings = self.rings();
        if !cut.is_short() {
            self.rings_of_short.get_or_insert(rings);
            self.strike(cut);
        }
        self.said.push(format!("after step {}: {cut:?}", self.step()));
        let healed = Instant::now() + self.plan.timeout.mul_f64(cut.timeouts);
        self.hosts.cut(cut.from, cut.to)?;
        if cut.both {
            self.hosts.cut(cut.to, cut.from)?;
        }
        while Instant::now() < healed {
            self.pulse()?;
            if !cut.is_short() {
                // Those that come in the place of others on such a host are cut off as well.
                self.strike(cut);
            }
        }
        self.hosts.heal(cut.from, cut.to)?;
        if cut.both {
            self.hosts.heal(cut.to, cut.from)?;
        }
        self.wait_for_calm(CALM)?;
        if cut.is_short() && self.rings() != rings {
            let mut recalls = of_kind(self.events.all(), "ring_recalled");
            let why = recalls.next_back().map(ToString::to_string).unwrap_or_default();
            return Err(self.failure(&format!("a cut that healed within the timeout was noticed: {why}")));
        }
        Ok(())
    }

    /// The workers that a cut concerns need not survive it.
    fn strike(&mut self, cut: &Cut) {
        let concerned: Vec<u64> = cut.workers().filter_map(|host| self.newest_on(host)).collect();
        self.struck.extend(concerned);
    }

    /// The worker on a host.
    fn newest_on(&self, host: usize) -> Option<u64> {
        let pid = u64::from(self.places.get(host - 1)?.worker.as_ref()?.id());
        let joined = of_kind(self.events.all(), "worker_joined");
        joined
            .filter(|event| event["pid"].as_u64() == Some(pid))
            .filter_map(|event| event["worker"].as_u64())
            .next_back()
    }

    /// Stops the run in order.
    fn stop(&mut self) -> io::Result<()> {
        if let Some(pid) = Pid::from_raw(self.coordinator.id().cast_signed()) {
            kill_process(pid, Signal::TERM)?;
        }
        while self.look()?.is_none() {}
        self.events.read().map(|_| ())
    }

    fn failure(&self, why: &str) -> io::Error {
        io::Error::other(format!("{why}\n  {}", self.said.join("\n  ")))
    }
}

impl Drop for Divided<'_> {
    fn drop(&mut self) {
        let workers = self.places.iter_mut().filter_map(|place| place.worker.as_mut());
        for child in std::iter::once(&mut self.coordinator).chain(workers) {
            // Fails only where it has ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
