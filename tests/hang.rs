//! A worker that is heard of, but whose device is stuck, is given up. Real processes, of a task that can be made to hang: this
//! program is the test, and with a subcommand the trainer under test.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use mattock::burn::nn::{Linear, LinearConfig};
use mattock::burn::prelude::*;
use mattock::chaos::events::{Events, of_kind};
use mattock::{Carry, Facts, Kernels, Output, Pass, Source, Task, TaskError};
use rustix::process::{Pid, Signal, kill_process};

/// Names a file with the id of the process that is to hang.
const STUCK: &str = "MATTOCK_TEST_STUCK";
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(120);

const RECIPE: &str = r#"
name = "stuck"
seed = 1
[model]
family = "stuck"
[data]
[batch]
size = 8
micro = 2
[optimizer]
name = "adamw"
lr = 1e-3
[train]
steps = 100000
[elastic]
timeout = "2s"
"#;

#[derive(Module, Debug)]
struct Layer<B: Backend> {
    linear: Linear<B>,
}

struct Stuck;

impl Task for Stuck {
    type Block<B: Backend> = Layer<B>;
    type Batch = Vec<f32>;

    fn open(_: &Source<'_>) -> Result<Self, TaskError> {
        Ok(Self)
    }

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> impl Iterator<Item = Layer<B>> {
        B::seed(device, seed);
        std::iter::once(Layer { linear: LinearConfig::new(4, 4).init(device) })
    }

    fn samples(&self) -> u64 {
        1000
    }

    fn batch(&self, samples: &[u64]) -> Result<Vec<f32>, TaskError> {
        Ok(samples.iter().flat_map(|&sample| [sample as f32 / 1000.0; 4]).collect())
    }

    fn forward<B: Kernels>(
        &self,
        block: &Layer<B>,
        _: Option<Carry<B>>,
        batch: &Vec<f32>,
        _: Pass,
    ) -> Output<B> {
        // So slow that a run has no thousands of steps while somebody looks.
        std::thread::sleep(Duration::from_millis(5));
        let stuck = || fs::read_to_string(std::env::var_os(STUCK)?).ok();
        while stuck().is_some_and(|pid| pid == std::process::id().to_string()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let device = block.linear.weight.device();
        let data = TensorData::new(batch.clone(), [batch.len() / 4, 4]);
        let out = block.linear.forward(Tensor::<B, 2>::from_data(data, &device));
        Output::Loss((out - 1.0).powi_scalar(2).mean())
    }

    fn facts(&self) -> Facts {
        Facts { dataset_hash: "none".to_owned(), ..Facts::default() }
    }
}

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|word| ["train", "coordinator", "worker"].contains(&&*word)) {
        return mattock::main::<Stuck>();
    }
    a_worker_whose_device_is_stuck_is_given_up();
    println!("a_worker_whose_device_is_stuck_is_given_up ... ok");
    ExitCode::SUCCESS
}

fn a_worker_whose_device_is_stuck_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (recipe, out, stuck) =
        (folder.path().join("recipe.toml"), folder.path().join("run"), folder.path().join("stuck"));
    fs::write(&recipe, RECIPE).unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut train = Command::new(std::env::current_exe().unwrap())
        .args(["train".as_ref(), recipe.as_os_str(), "--workers".as_ref(), "2".as_ref()])
        .args(["--out".as_ref(), out.as_os_str()])
        .env(STUCK, &stuck)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut events = Events::of(&out);
    let said = |folder: &Path| fs::read_to_string(folder.join("log")).unwrap_or_default();
    let mut wait = |train: &mut Child, what: &str, done: &dyn Fn(&[serde_json::Value]) -> bool| {
        let until = Instant::now() + LONG;
        while !done(events.read().unwrap()) {
            let ended = train.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < until,
                "no {what}, {ended:?}:\n{}",
                said(folder.path())
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        events.all().to_vec()
    };
    let before = wait(&mut train, "steps", &|events| of_kind(events, "step").count() >= 3);
    let victim = of_kind(&before, "worker_joined").last().unwrap();
    fs::write(&stuck, victim["pid"].to_string()).unwrap();
    let after = wait(&mut train, "loss", &|events| of_kind(events, "worker_lost").count() > 0);
    let lost = of_kind(&after, "worker_lost").next().unwrap();
    assert_eq!(lost["worker"], victim["worker"]);
    assert!(lost["reason"].as_str().unwrap().contains("one piece of work"), "{lost}");
    wait(&mut train, "step of two workers again", &|events| {
        let ring = of_kind(events, "ring_formed").last().unwrap();
        ring["world_size"] == 2
            && of_kind(events, "step").last().unwrap()["generation"] == ring["generation"]
            && of_kind(events, "worker_joined").count() == 3
    });
    kill_process(Pid::from_raw(train.id() as i32).unwrap(), Signal::TERM).unwrap();
    assert_eq!(train.wait().unwrap().code(), Some(130), "{}", said(folder.path()));
}
