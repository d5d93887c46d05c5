//! A real coordinator under a thousand workers that do nothing but talk to it.
//!
//! ```text
//!   this process ── `mattock coordinator`, a process of its own: what it takes is read from /proc
//!        └───────── `mattock bench crowd`, some: each with hundreds of real clients, identities and connections
//! ```
//!
//! A client joins as every worker does, is put into a ring, sends the pulses that workers send, and reports a step now and
//! then. There is no data plane: nothing is trained.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use mattock_coordinator::identity::JoinToken;
use mattock_coordinator::membership::{Instruction, Member};
use mattock_coordinator::protocol::{About, Formation, FromWorker, Holding, Pulse, StepReport};
use mattock_coordinator::{Client, Reporter};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Descriptors that a client takes: its socket, and what its thread's runtime waits by.
const DESCRIPTORS: u64 = 8;
/// And a process besides.
const DESCRIPTORS_BESIDES: u64 = 64;
/// Pulses within a timeout, as workers send them.
const PULSES: u32 = 8;
/// Between two looks at all clients of a process.
const LOOK: Duration = Duration::from_millis(5);
/// All must have joined by then.
const GATHER: Duration = Duration::from_secs(600);
/// Of what the system counts processor time in, where it does not say.
const TICKS_PER_SECOND: u64 = 100;

/// What is measured.
#[derive(Debug, Clone)]
pub(crate) struct Crowd {
    /// Workers.
    pub(crate) workers: NonZeroU32,
    /// Workers of one process.
    pub(crate) each: NonZeroU32,
    /// How long.
    pub(crate) window: Duration,
    /// The recipe's.
    pub(crate) timeout: Duration,
    /// From one step to the next.
    pub(crate) step: Duration,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct CrowdSample {
    /// Workers.
    pub(crate) workers: u32,
    /// Seconds from the first client's start until all were in a ring and had done a step.
    pub(crate) gathered_seconds: f64,
    /// Messages of workers in a second.
    pub(crate) messages_per_second: f64,
    /// Steps recorded in a second.
    pub(crate) steps_per_second: f64,
    /// The coordinator's processor time over time.
    pub(crate) cpu: f64,
    /// The coordinator's memory at the end, and at most.
    pub(crate) resident_bytes: u64,
    /// At most, from its start.
    pub(crate) peak_bytes: u64,
}

/// A process's first line.
#[derive(Debug, Serialize, Deserialize)]
struct Assignment {
    token: PathBuf,
    count: u32,
    timeout_ms: u64,
    step_ms: u64,
}

/// Measures; what it takes is removed again.
///
/// # Errors
/// Where a process cannot be started, too few files may be open, or not all workers come in time.
pub(crate) fn measure_crowd(crowd: &Crowd) -> anyhow::Result<CrowdSample> {
    let folder = Scratch::new()?;
    let mut coordinator = start_coordinator(crowd, &folder.0)?;
    let events = follow(&mut coordinator.0)?;
    wait_for(&events, "listening", GATHER)?;
    let begun = Instant::now();
    let mut talkers = Vec::new();
    let mut left = crowd.workers.get();
    while left > 0 {
        let count = left.min(crowd.each.get());
        talkers.push(start_talkers(crowd, count, folder.0.join("token"))?);
        left -= count;
    }
    wait_for(&events, "step", GATHER)?;
    let gathered_seconds = begun.elapsed().as_secs_f64();
    let pid = coordinator.0.id();
    while events.try_recv().is_ok() {}
    let (since, cpu, said) = (Instant::now(), cpu_seconds(pid)?, count_all(&mut talkers)?);
    sleep(crowd.window);
    let (took, cpu, said) =
        (since.elapsed().as_secs_f64(), cpu_seconds(pid)? - cpu, count_all(&mut talkers)? - said);
    let mut steps = 0;
    while let Ok(event) = events.try_recv() {
        match event["event"].as_str() {
            Some("step") => steps += 1,
            Some("worker_lost") => {
                bail!("{} was lost: the machine is too small for so many", event["worker"])
            }
            _ => {}
        }
    }
    ensure!(steps > 0, "no step was recorded within {:?}: make the window longer than a step", crowd.window);
    let (resident_bytes, peak_bytes) = memory(pid)?;
    Ok(CrowdSample {
        workers: crowd.workers.get(),
        gathered_seconds,
        messages_per_second: said as f64 / took,
        steps_per_second: f64::from(steps) / took,
        cpu: cpu / took,
        resident_bytes,
        peak_bytes,
    })
}

/// A folder that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Self> {
        let folder = crate::cache::folder().join(format!("crowd-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child that does not outlive this process's interest in it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails only where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_coordinator(crowd: &Crowd, folder: &Path) -> anyhow::Result<Killed> {
    let recipe = folder.join("recipe.toml");
    let (workers, timeout) = (crowd.workers, crowd.timeout.as_millis());
    let text = format!(
        "name = \"crowd\"\nmodel.family = \"gpt\"\nbatch = {{ size = {workers}, micro = 1 }}\noptimizer.lr = 1e-3\n\
         train.steps = 1000000000\nelastic = {{ min_workers = 1, max_workers = {workers}, timeout = \"{timeout}ms\" }}\n"
    );
    fs::write(&recipe, text)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("coordinator").arg(&recipe).arg("--out").arg(folder);
    command.arg("--token-file").arg(folder.join("token")).args(["--workers", &workers.to_string()]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    Ok(Killed(child.context("cannot start a coordinator")?))
}

/// The coordinator's events, as they come.
fn follow(coordinator: &mut Child) -> anyhow::Result<mpsc::Receiver<Value>> {
    let lines =
        BufReader::new(coordinator.stdout.take().context("the coordinator has no standard output")?).lines();
    let (sender, events) = mpsc::channel();
    std::thread::spawn(move || {
        for event in lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()) {
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    Ok(events)
}

fn wait_for(events: &mpsc::Receiver<Value>, kind: &str, limit: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let event = events
            .recv_timeout(left)
            .map_err(|_| anyhow!("the coordinator tells of no {kind} within {limit:?}"))?;
        match event["event"].as_str() {
            Some(found) if found == kind => return Ok(()),
            Some("run_ended") => bail!("the run ended: {}", event["error"]),
            Some("worker_lost") => bail!(
                "worker {} was lost while they gathered ({}): this machine is too small or too busy for so many, or --timeout \
                 too short",
                event["worker"],
                event["reason"]
            ),
            _ => {}
        }
    }
}

/// One process of many clients.
struct Talkers {
    _child: Killed,
    stdin: ChildStdin,
    answers: BufReader<std::process::ChildStdout>,
}

fn start_talkers(crowd: &Crowd, count: u32, token: PathBuf) -> anyhow::Result<Talkers> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.args(["bench", "crowd"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("it has no standard input")?;
    let answers = BufReader::new(child.stdout.take().context("it has no standard output")?);
    let (timeout_ms, step_ms) = (crowd.timeout.as_millis() as u64, crowd.step.as_millis() as u64);
    let assignment = Assignment { token, count, timeout_ms, step_ms };
    writeln!(stdin, "{}", serde_json::to_string(&assignment)?)?;
    Ok(Talkers { _child: Killed(child), stdin, answers })
}

/// How many messages all of them have sent so far.
fn count_all(talkers: &mut [Talkers]) -> anyhow::Result<u64> {
    let mut sum = 0;
    for talkers in talkers {
        writeln!(talkers.stdin, "count").context("clients have ended")?;
        let mut line = String::new();
        talkers.answers.read_line(&mut line)?;
        sum += line.trim().parse::<u64>().context("clients have ended")?;
    }
    Ok(sum)
}

/// Processor seconds of a process so far.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("the coordinator has ended")?;
    // The name before may have spaces and brackets.
    let after_name = text.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok());
    Ok(ticks.sum::<u64>() as f64 / TICKS_PER_SECOND as f64)
}

/// Bytes in memory now, and at most.
fn memory(pid: u32) -> anyhow::Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).context("the coordinator has ended")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    let kib =
        |name| field(name).map(|kib| kib * 1024).with_context(|| format!("the system does not tell {name}"));
    Ok((kib("VmRSS:")?, kib("VmHWM:")?))
}

/// Runs `mattock bench crowd`: what to do comes from standard input.
///
/// # Errors
/// A failed run, whatever it is.
pub(crate) fn serve_crowd(out: &mut impl Write) -> anyhow::Result<()> {
    let (asked, questions) = mpsc::channel();
    std::thread::spawn(move || {
        io::stdin().lines().map_while(Result::ok).for_each(|line| drop(asked.send(line)));
        // Nobody is interested any more.
        std::process::exit(0);
    });
    let line = questions.recv().context("nobody says what to do")?;
    let assignment: Assignment = serde_json::from_str(&line)?;
    allow_files(u64::from(assignment.count) * DESCRIPTORS + DESCRIPTORS_BESIDES)?;
    let token = JoinToken::read(&assignment.token)?;
    let timeout = Duration::from_millis(assignment.timeout_ms);
    let mut talkers = Vec::new();
    for number in 0..assignment.count {
        talkers.push(Talker::join(&token, timeout, number)?);
        talk(&mut talkers, &assignment)?;
    }
    loop {
        talk(&mut talkers, &assignment)?;
        if questions.try_recv().is_ok() {
            writeln!(out, "{}", talkers.iter().map(|talker| talker.sent).sum::<u64>())?;
            out.flush()?;
        }
        sleep(LOOK);
    }
}

/// Raises the number of files that may be open, as far as the system lets.
fn allow_files(wanted: u64) -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let most = limit.maximum.unwrap_or(u64::MAX);
    ensure!(
        most >= wanted,
        "so many clients open up to {wanted} files, and a process may open {most}: raise the limit (`ulimit -Hn {wanted}`), \
         or give each process fewer (--each)"
    );
    limit.current = Some(wanted);
    setrlimit(Resource::Nofile, limit).context("cannot raise the number of open files")
}

fn talk(talkers: &mut [Talker], assignment: &Assignment) -> anyhow::Result<()> {
    talkers.iter_mut().try_for_each(|talker| talker.talk(assignment))
}

/// A worker that only talks.
struct Talker {
    client: Client,
    reporter: Reporter,
    member: Member,
    /// Its ring, and since when it trains.
    trains: Option<(Instant, u32, Formation)>,
    rank: u32,
    done: u64,
    pulse_at: Instant,
    sent: u64,
}

impl Talker {
    fn join(token: &JoinToken, timeout: Duration, number: u32) -> anyhow::Result<Self> {
        let enrollment = Client::enroll(token, timeout)?;
        let address = format!("{}:{}", enrollment.local_ip(), 20_000 + number % 40_000);
        let about = About {
            pid: std::process::id(),
            host: mattock_worker::host::name().to_owned(),
            address,
            fingerprint: "it only talks".to_owned(),
        };
        let member = Member::new(enrollment.worker());
        let client = enrollment.join(about)?;
        let reporter = client.reporter();
        reporter.send(FromWorker::Ready { step: Some(0) })?;
        let (trains, rank, done, pulse_at, sent) = (None, 0, 0, Instant::now(), 1);
        Ok(Self { client, reporter, member, trains, rank, done, pulse_at, sent })
    }

    fn say(&mut self, message: FromWorker) -> anyhow::Result<()> {
        self.sent += 1;
        Ok(self.reporter.send(message)?)
    }

    /// Takes in what has come, and says what is due.
    fn talk(&mut self, assignment: &Assignment) -> anyhow::Result<()> {
        while let Some(message) = self.client.receive(Duration::ZERO)? {
            match self.member.receive(message) {
                Some(Instruction::Link { rank, formation }) => {
                    self.rank = rank;
                    self.say(FromWorker::Linked { generation: formation.generation })?;
                }
                Some(Instruction::Train(formation)) => {
                    self.done = formation.step;
                    self.trains = Some((Instant::now(), 0, formation));
                }
                Some(Instruction::Recall { generation, .. }) => {
                    self.trains = None;
                    let holding = Holding::at(self.done);
                    self.say(FromWorker::Held { generation, holding })?;
                }
                Some(Instruction::End { reason } | Instruction::Leave { reason }) => bail!("{reason}"),
                Some(Instruction::Restore { .. } | Instruction::Stop) | None => {}
            }
        }
        let now = Instant::now();
        if now >= self.pulse_at {
            self.pulse_at = now + Duration::from_millis(assignment.timeout_ms) / PULSES;
            self.say(FromWorker::Pulse(Pulse {
                progress: self.sent,
                busy: true,
                slowest_ms: assignment.step_ms,
            }))?;
        }
        self.step(now, Duration::from_millis(assignment.step_ms))
    }

    fn step(&mut self, now: Instant, every: Duration) -> anyhow::Result<()> {
        let Some((since, steps, formation)) = &mut self.trains else { return Ok(()) };
        if now < *since + every * (*steps + 1) {
            return Ok(());
        }
        *steps += 1;
        let report = report(formation, self.rank, self.done);
        self.done += 1;
        self.say(FromWorker::Step(report))
    }
}

/// Of the step after `done`: as large as a real one, and the same from all.
pub(super) fn report(formation: &Formation, rank: u32, done: u64) -> StepReport {
    let share = formation.places.get(rank as usize).map(|place| place.share(formation.step, done).to_vec());
    let hash = |step: u64| step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let phases = ["compute", "exchange", "update", "data", "hash", "wait"];
    StepReport {
        generation: formation.generation,
        step: done + 1,
        rank,
        loss: 1.0 / (done + 1) as f64,
        grad_norm: 1.0,
        lr: 1e-4,
        hash_before: hash(done),
        state_hash: Some(hash(done + 1)),
        tokens: 1 << 24,
        wide_blocks: 0,
        counts: formation.places.iter().map(|place| place.share(formation.step, done).len() as u32).collect(),
        micro_batches: share.unwrap_or_default(),
        tx_bytes: 1 << 33,
        rx_bytes: 1 << 33,
        held: vec![("parameters".to_owned(), 1 << 33), ("moments".to_owned(), 1 << 34)],
        sent: vec![("all-gather".to_owned(), 1 << 33)],
        seconds: phases.iter().map(|phase| ((*phase).to_owned(), 0.125)).collect(),
    }
}
