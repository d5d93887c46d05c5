//! A run that real clients keep going, while somebody else misbehaves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mattock_coordinator::event::Event;
use mattock_coordinator::identity::JoinToken;
use mattock_coordinator::membership::{Config, Outcome};
use mattock_coordinator::protocol::{About, Finish, Formation, FromCoordinator, FromWorker, StepReport};
use mattock_coordinator::{Client, Command, RunEnd, Server, ServerConfig};
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
    done: Vec<u64>,
    goal: Option<u64>,
}

pub struct Run {
    pub token: JoinToken,
    pub runtime: Runtime,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<Result<(), String>>>,
    end: tokio::task::JoinHandle<RunEnd>,
    _commands: mpsc::Sender<Command>,
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
        shared.pace.lock().unwrap().done = vec![0; setup.expected as usize];
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
        Self { token, runtime, shared, workers: Vec::new(), end, _commands: commands }
    }

    /// A run that trains on two workers.
    pub fn training() -> Self {
        Self::gathering(Setup::default()).trained()
    }

    /// Adds the workers that are missing, and waits until they train.
    pub fn trained(mut self) -> Self {
        let expected = self.shared.pace.lock().unwrap().done.len();
        while self.workers.len() < expected {
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

    /// A worker that besides its steps reports as much as it can.
    pub fn add_flooding_worker(&mut self) {
        let (token, shared) = (self.token.clone(), Arc::clone(&self.shared));
        self.workers.push(std::thread::spawn(move || work(&token, &shared, true)));
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
            let goal = pace.done.iter().max().unwrap() + 3;
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

    /// Waits for a run that ends without being told to.
    pub fn ended(self) -> RunEnd {
        self.runtime.block_on(async { tokio::time::timeout(PATIENT, self.end).await }).unwrap().unwrap()
    }
}

pub fn config(setup: Setup) -> ServerConfig {
    let membership = Config {
        micro_batches: MICRO_BATCHES,
        expected: setup.expected,
        max_workers: setup.expected,
        timeout: setup.timeout,
        mixed: false,
    };
    ServerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        run: "wire".to_owned(),
        steps: 1_000_000,
        recipe: RECIPE.to_owned(),
        settings: String::new(),
        token_lifetime: setup.token_lifetime,
        membership,
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
        state_hash: HASH ^ step,
        tokens: 1024,
        wide_blocks: 0,
        micro_batches: (0..MICRO_BATCHES).filter(|index| index % ranks == rank).collect(),
        tx_bytes: 1,
        rx_bytes: 1,
        seconds: vec![("compute".to_owned(), 0.001)],
    }
}

/// A worker from its token to the run's end, without the training.
fn work(token: &JoinToken, shared: &Shared, floods: bool) -> Result<(), String> {
    let say = |error: &dyn std::fmt::Display| error.to_string();
    let enrollment = Client::enroll(token, token.timeout()).map_err(|error| say(&error))?;
    let worker = enrollment.worker();
    let client = enrollment.join(about()).map_err(|error| say(&error))?;
    if client.recipe() != RECIPE {
        return Err("the recipe came out different".to_owned());
    }
    let reporter = client.reporter();
    let tell = |message| reporter.send(message).map_err(|error| error.to_string());
    tell(FromWorker::Ready { step: 0 })?;
    let form = |message: &FromCoordinator| match message {
        FromCoordinator::Form(formation) => Some(formation.clone()),
        _ => None,
    };
    let Formation { generation, places, .. } = await_message(&client, form)?;
    tell(FromWorker::Linked { generation })?;
    await_message(&client, |message| matches!(message, FromCoordinator::Start { .. }).then_some(()))?;
    if floods {
        let reporter = client.reporter();
        let text = "x".repeat(1000);
        // It ends with the connection.
        std::thread::spawn(move || while reporter.send(FromWorker::Notice { text: text.clone() }).is_ok() {});
    }
    let rank = places.iter().position(|place| place.worker == worker).unwrap();
    let mut step = 0;
    while let Some(next) = shared.next_step(rank)? {
        step = next;
        tell(FromWorker::Step(report(generation, rank as u32, places.len() as u32, step)))?;
        std::thread::sleep(STEP);
    }
    tell(FromWorker::Finished(Finish {
        step,
        completed: true,
        state_hash: HASH,
        held_out_loss: None,
        unigram_loss: None,
        parameters: 1,
    }))?;
    await_message(&client, |message| matches!(message, FromCoordinator::End { .. }).then_some(()))?;
    client.close();
    Ok(())
}

fn await_message<T>(client: &Client, wanted: impl Fn(&FromCoordinator) -> Option<T>) -> Result<T, String> {
    loop {
        let message = client.receive(PATIENT).map_err(|error| error.to_string())?;
        let message = message.ok_or("nothing came of the coordinator")?;
        if let Some(found) = wanted(&message) {
            return Ok(found);
        }
        if let FromCoordinator::End { reason } = message {
            return Err(reason);
        }
    }
}

impl Shared {
    /// The next step of a rank, once all others have done theirs; none when the goal is reached.
    fn next_step(&self, rank: usize) -> Result<Option<u64>, String> {
        let deadline = Instant::now() + PATIENT;
        loop {
            let mut pace = self.pace.lock().unwrap();
            let mine = pace.done[rank];
            if pace.done.iter().all(|done| *done >= mine) {
                if pace.goal.is_some_and(|goal| mine >= goal) {
                    return Ok(None);
                }
                pace.done[rank] += 1;
                return Ok(Some(mine + 1));
            }
            drop(pace);
            if Instant::now() > deadline {
                return Err("the other ranks do not come along".to_owned());
            }
            std::thread::sleep(STEP / 5);
        }
    }
}
