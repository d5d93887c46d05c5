//! A run that real clients keep going, while somebody else misbehaves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mattock_coordinator::event::Event;
use mattock_coordinator::identity::JoinToken;
use mattock_coordinator::membership::{Config, Outcome, assigned};
use mattock_coordinator::protocol::{
    About, Finish, Formation, FromCoordinator, FromWorker, Holding, Place, StepReport,
};
use mattock_coordinator::{Client, Command, RunEnd, Server, ServerConfig, WorkerId};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// Whatever is awaited comes within this, on however busy a machine.
pub const PATIENT: Duration = Duration::from_secs(240);
/// Of a run that should not notice any silence.
pub const LONG: Duration = Duration::from_secs(20);
/// Of a run in which a timeout must run out.
pub const SHORT: Duration = Duration::from_secs(4);

pub const RECIPE: &str = "name = \"the recipe that nobody on the way may read\"";
pub const HOST: &str = "a-host-that-nobody-on-the-way-may-know";
const HASH: u64 = 0x5eed;
const MICRO_BATCHES: u32 = 4;
/// Between two steps.
const STEP: Duration = Duration::from_millis(5);

/// What a run should be like.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Workers that the run waits for.
    pub expected: u32,
    pub timeout: Duration,
    pub token_lifetime: Duration,
    /// Events that may wait for their reader.
    pub events_max: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self { expected: 2, timeout: LONG, token_lifetime: Duration::from_secs(3600), events_max: 1024 }
    }
}

/// What the run's events and workers say.
#[derive(Default)]
struct Shared {
    events: Mutex<Vec<Event>>,
    paused: AtomicBool,
    pace: Mutex<Pace>,
    changed: Condvar,
}

/// Ranks step together, as in a ring; the run's end is agreed on.
#[derive(Default)]
struct Pace {
    /// Steps of each worker.
    done: BTreeMap<WorkerId, u64>,
    goal: Option<u64>,
}

pub struct Run {
    pub token: JoinToken,
    pub runtime: Runtime,
    shared: Arc<Shared>,
    expected: usize,
    workers: Vec<JoinHandle<Result<(), String>>>,
    end: tokio::task::JoinHandle<RunEnd>,
    commands: mpsc::Sender<Command>,
}

impl Run {
    /// A coordinator that waits for workers.
    pub fn gathering(setup: Setup) -> Self {
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(Server::bind(config(setup)));
        let server = server.unwrap();
        let token = server.token().clone();
        let (events, mut emitted) = mpsc::channel(setup.events_max);
        let (commands, commanded) = mpsc::channel(4);
        let end = runtime.spawn(server.run(events, commanded));
        let shared = Arc::<Shared>::default();
        let reader = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Some(event) = emitted.blocking_recv() {
                while reader.paused.load(Ordering::SeqCst) {
                    std::thread::sleep(STEP);
                }
                reader.events.lock().unwrap().push(event);
                reader.changed.notify_all();
            }
        });
        let (expected, workers) = (setup.expected as usize, Vec::new());
        Self { token, runtime, shared, expected, workers, end, commands }
    }

    /// A run that trains on two workers.
    pub fn training() -> Self {
        Self::gathering(Setup::default()).trained()
    }

    /// Adds the workers that are missing, and waits until they train.
    pub fn trained(mut self) -> Self {
        while self.workers.len() < self.expected {
            self.add_worker();
        }
        self.advance(3);
        self
    }

    pub fn add_worker(&mut self) {
        let token = self.token.clone();
        self.add_worker_with(&token);
    }

    /// A worker that finds the run by another token.
    pub fn add_worker_with(&mut self, token: &JoinToken) {
        let (token, shared) = (token.clone(), Arc::clone(&self.shared));
        self.workers.push(std::thread::spawn(move || work(&token, &shared, false)));
    }

    /// Waits for the end of a worker that is not to come along any more.
    pub fn remove_worker(&mut self, index: usize) -> Result<(), String> {
        self.workers.remove(index).join().unwrap()
    }

    /// A worker that besides its steps reports as much as it can.
    pub fn add_flooding_worker(&mut self) {
        let (token, shared) = (self.token.clone(), Arc::clone(&self.shared));
        self.workers.push(std::thread::spawn(move || work(&token, &shared, true)));
    }

    /// Tells the coordinator that a process has ended, and another is started in its place.
    pub fn process_exited(&self, host: &str, pid: u32, status: &str) {
        let (host, status) = (host.to_owned(), status.to_owned());
        let exited = Command::ProcessExited { host, pid, status, bad_input: false, replaced: true, left: 2 };
        self.commands.blocking_send(exited).unwrap();
    }

    /// Makes the reader of events stop to read, or go on.
    pub fn pause_reading(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::SeqCst);
    }

    pub fn events(&self) -> Vec<Event> {
        self.shared.events.lock().unwrap().clone()
    }

    /// Waits for an event.
    pub fn expect<T>(&self, what: &str, wanted: impl Fn(&Event) -> Option<T>) -> T {
        self.expect_after(0, what, wanted)
    }

    /// Waits for an event that is none of the first ones.
    pub fn expect_after<T>(&self, first: usize, what: &str, wanted: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENT;
        let mut events = self.shared.events.lock().unwrap();
        let mut looked_at = first;
        loop {
            if let Some(found) = events[looked_at..].iter().find_map(&wanted) {
                return found;
            }
            looked_at = events.len();
            let left = deadline.saturating_duration_since(Instant::now());
            let last = &events[events.len().saturating_sub(20)..];
            assert!(!left.is_zero(), "no event of {what}; the last of {} are {last:#?}", events.len());
            events = self.shared.changed.wait_timeout(events, left).unwrap().0;
        }
    }

    /// Waits until the coordinator says that it refused somebody for a reason that has all these words.
    pub fn expect_refusal(&self, words: &[&str]) -> String {
        self.expect(&format!("a refusal with {words:?}"), |event| match event {
            Event::WorkerRefused { reason } if words.iter().all(|word| reason.contains(word)) => {
                Some(reason.clone())
            }
            _ => None,
        })
    }

    /// Waits for so many more steps.
    pub fn advance(&self, steps: u64) {
        let step = |event: &Event| if let Event::Step(record) = event { record.step } else { 0 };
        let now = self.events().iter().map(step).max().unwrap_or(0);
        self.expect("a later step", |event| (step(event) >= now + steps).then_some(()));
    }

    /// Lets the run come to its end: all its workers are there, and no step is missing.
    pub fn finish(self) {
        self.advance(3);
        let goal = {
            let mut pace = self.shared.pace.lock().unwrap();
            let goal = pace.done.values().max().unwrap() + 3;
            pace.goal = Some(goal);
            goal
        };
        for worker in self.workers {
            assert_eq!(worker.join().unwrap(), Ok(()));
        }
        let end = self.runtime.block_on(async { tokio::time::timeout(PATIENT, self.end).await });
        let end = end.unwrap().unwrap();
        assert!(matches!(end.outcome, Outcome::Completed(_)), "{end:?}");
        let events = self.shared.events.lock().unwrap();
        let steps: Vec<u64> = events
            .iter()
            .filter_map(|event| if let Event::Step(record) = event { Some(record.step) } else { None })
            .collect();
        assert_eq!(steps, (1..=goal).collect::<Vec<_>>(), "each step once, in order");
    }

    /// Waits for the loss of a worker, and returns why it was lost.
    pub fn expect_loss(&self, lost: u64) -> String {
        self.expect(&format!("the loss of worker {lost}"), |event| match event {
            Event::WorkerLost { worker, reason } if *worker == lost => Some(reason.clone()),
            _ => None,
        })
    }
}

pub fn config(setup: Setup) -> ServerConfig {
    let membership = Config {
        micro_batches: MICRO_BATCHES,
        expected: setup.expected,
        min_workers: 1,
        max_workers: setup.expected,
        timeout: setup.timeout,
        mixed: false,
        divided: false,
    };
    ServerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        run: "wire".to_owned(),
        steps: 1_000_000,
        recipe: RECIPE.to_owned(),
        settings: String::new(),
        token_lifetime: setup.token_lifetime,
        launcher: true,
        membership,
        failover: None,
    }
}

/// What a worker says of itself.
pub fn about() -> About {
    About {
        pid: std::process::id(),
        host: HOST.to_owned(),
        address: "127.0.0.1:1".to_owned(),
        fingerprint: "all alike".to_owned(),
    }
}

pub fn report(generation: u64, rank: u32, ranks: u32, step: u64) -> StepReport {
    StepReport {
        generation,
        step,
        rank,
        loss: 1.0 / step as f64,
        grad_norm: 1.0,
        lr: 0.1,
        hash_before: HASH ^ (step - 1),
        state_hash: Some(HASH ^ step),
        tokens: 1024,
        wide_blocks: 0,
        micro_batches: assigned(MICRO_BATCHES, ranks, rank).collect(),
        counts: Vec::new(),
        tx_bytes: 1,
        rx_bytes: 1,
        held: Vec::new(),
        sent: Vec::new(),
        seconds: vec![("compute".to_owned(), 0.001)],
    }
}

/// A worker from its token to the run's end, without the training.
fn work(token: &JoinToken, shared: &Shared, floods: bool) -> Result<(), String> {
    let enrollment = Client::enroll(token, token.timeout()).map_err(|error| error.to_string())?;
    let worker = enrollment.worker();
    let client = enrollment.join(about()).map_err(|error| error.to_string())?;
    if client.recipe() != RECIPE {
        return Err("the recipe came out different".to_owned());
    }
    let step = if client.under_way() { None } else { Some(0) };
    let worked = Work { worker, client: &client, shared, floods, step, ring: None, trains: false }.run();
    client.close();
    worked
}

/// A worker that has joined.
struct Work<'a> {
    worker: WorkerId,
    client: &'a Client,
    shared: &'a Shared,
    floods: bool,
    /// Steps done in its state, if it has one.
    step: Option<u64>,
    ring: Option<Formation>,
    trains: bool,
}

impl Work<'_> {
    fn run(mut self) -> Result<(), String> {
        let mut step = self.step;
        self.tell(FromWorker::Ready { step })?;
        let mut heard = Instant::now();
        loop {
            // The time that a step takes, or long.
            let message = self.client.receive(STEP).map_err(|error| error.to_string())?;
            if let Some(message) = message {
                heard = Instant::now();
                if let FromCoordinator::End { reason } = message {
                    let over =
                        self.shared.pace.lock().unwrap().goal.is_some_and(|goal| self.step == Some(goal));
                    return if over { Ok(()) } else { Err(reason) };
                }
                self.follow(message)?;
            }
            match &self.ring {
                Some(ring) if self.trains => self.go_on(&ring.clone())?,
                _ => {}
            }
            if self.step != step {
                (step, heard) = (self.step, Instant::now());
            }
            if heard.elapsed() > PATIENT {
                return Err("neither the coordinator nor the other ranks come along".to_owned());
            }
        }
    }

    fn tell(&self, message: FromWorker) -> Result<(), String> {
        self.client.reporter().send(message).map_err(|error| error.to_string())
    }

    fn follow(&mut self, message: FromCoordinator) -> Result<(), String> {
        match message {
            FromCoordinator::Form(formation) if formation.places.iter().any(|p| p.worker == self.worker) => {
                let generation = formation.generation;
                self.ring = Some(formation);
                self.tell(FromWorker::Linked { generation })
            }
            FromCoordinator::Start { .. } => {
                self.trains = true;
                // As if it came from a rank that has it.
                let start = self.ring.as_ref().map_or(0, |ring| ring.step);
                self.step = Some(start);
                self.shared.pace.lock().unwrap().done.insert(self.worker, start);
                if std::mem::take(&mut self.floods) {
                    let reporter = self.client.reporter();
                    let text = "x".repeat(1000);
                    let flood =
                        move || while reporter.send(FromWorker::Notice { text: text.clone() }).is_ok() {};
                    // It ends with the connection.
                    std::thread::spawn(flood);
                }
                Ok(())
            }
            FromCoordinator::Recall { generation, .. } => {
                self.trains = false;
                let holding = self.step.map(Holding::at).unwrap_or_default();
                self.tell(FromWorker::Held { generation, holding })
            }
            _ => Ok(()),
        }
    }

    /// Does the next step, once all others of the ring have done theirs; or is done.
    fn go_on(&mut self, ring: &Formation) -> Result<(), String> {
        let mine = self.step.unwrap_or(0);
        let mut pace = self.shared.pace.lock().unwrap();
        let done = |place: &Place| pace.done.get(&place.worker).copied().unwrap_or(ring.step);
        if ring.places.iter().any(|place| done(place) < mine) {
            return Ok(());
        }
        if pace.goal.is_some_and(|goal| mine >= goal) {
            self.trains = false;
            return self.tell(FromWorker::Finished(Finish {
                step: mine,
                completed: true,
                state_hash: HASH,
                held_out_loss: None,
                unigram_loss: None,
                parameters: 1,
            }));
        }
        pace.done.insert(self.worker, mine + 1);
        drop(pace);
        self.step = Some(mine + 1);
        let rank = ring.places.iter().position(|place| place.worker == self.worker).unwrap();
        let report = report(ring.generation, rank as u32, ring.places.len() as u32, mine + 1);
        self.tell(FromWorker::Step(report))
    }
}
