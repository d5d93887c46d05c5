//! `mattock chaos`: whatever happens to its workers and its coordinator, a run leaves no trace of it. Shown with real processes.

use std::ffi::OsString;
use std::io;
use std::io::Write;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use mattock_worker::plan::Shard;

use super::recipe::RecipeFile;
use crate::chaos::aimed::{Aim, Fixed, STEPS_MIN, aim, kill};
use crate::chaos::audit::{Flip, Harm, Moment, Reference, Report};
use crate::chaos::disturb::{Ended, Plan, Planted, disturb, log_of};
use crate::chaos::divided::{self, divide};
use crate::chaos::events::of_kind;
use crate::chaos::hosts::Hosts;
use crate::chaos::partitions::partitions;
use crate::chaos::schedule::{FLIP_STEPS_MIN, Fault, Limits, flip, schedule};
use crate::chaos::stop::Stop;
use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::launch;
use crate::recipe::Resolved;

/// Worker processes of a run, where nothing else is said.
const WORKERS: u32 = 3;
/// Why this program makes nobody fail from within.
const RELEASED: &str =
    "this program was built without debug assertions: use one that `cargo build` makes, without --release";

const EXAMPLES: &str = "\
Examples:
  mattock chaos configs/quickstart.toml --set train.steps=100 --set elastic.timeout=2s
  mattock chaos configs/quickstart.toml --seed 17 --seeds 1      (the same faults again)
  mattock chaos configs/quickstart.toml --partitions --set elastic.timeout=4s      (as root)
  mattock chaos configs/quickstart.toml --aimed --seeds 12 --set train.steps=20

With --partitions each worker, and the coordinator, has a host of its own, a network namespace of this machine. Ways between
them are cut, in one direction or both: half of them heal within the timeout, which must cost no ring, half after it. A run
has as many steps as that takes, whatever the recipe says.

With --corrupt a bit of one worker's memory flips, early in each run, before its other faults: it must be named before anything of
it counts. Three workers are needed, for a majority says who is right, and a program built with debug assertions (`cargo build`,
not `cargo build --release`): others cannot be made to fail so.

With --aimed one worker dies in each run, and nothing else happens: at the worst moments of a step, which are between its buckets,
between their sums and the commit, after the commit, and while the step is written; or at any time. The seed draws who, in which step,
and what kind of run it is, as far as --workers, --set parallel.shard= and --set parallel.buddies= do not say it: all kinds are held
against one undisturbed run. A dozen seeds divide the state in each way among one to four workers, sixty do so at each moment. That, too,
takes a program built with debug assertions.

Held against the undisturbed run are every step's loss and state hash, the micro-batches that each step counted, the end, and which
processes there were.
";

/// Kill, stop, send away and add workers of a run by a seed, kill its coordinator, and hold it against one to which nothing happens
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct ChaosArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Worker processes of each run; 3, or with --aimed as many as the seed draws
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroU32>,
    /// The first seed; each is a schedule of faults
    #[arg(long, value_name = "SEED", default_value = "1")]
    pub seed: u64,
    /// How many seeds, one run each
    #[arg(long, value_name = "N", default_value = "3")]
    pub seeds: NonZeroU32,
    /// Faults of each run
    #[arg(long, value_name = "N", default_value = "6")]
    pub faults: usize,
    /// Cut the ways between hosts, instead of doing anything to processes
    #[arg(long)]
    pub partitions: bool,
    /// Flip a bit of a worker's memory in each run, too; only builds with debug assertions can
    #[arg(long, conflicts_with = "partitions")]
    pub corrupt: bool,
    /// Let one worker die at a moment of a step in each run, whose kind the seed draws, too; only builds with debug assertions can
    #[arg(long, conflicts_with_all = ["partitions", "corrupt"])]
    pub aimed: bool,
    /// Faults strike up to so many milliseconds after a step
    #[arg(long, value_name = "MS", default_value = "300")]
    pub delay: u64,
    /// Give a run up that takes longer than so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub limit: u64,
    /// Where the runs lie, each with its log; those of an earlier call are overwritten
    #[arg(long, value_name = "DIR", default_value = "runs/chaos")]
    pub out: PathBuf,
}

/// Runs `mattock chaos`; `out` is standard output.
///
/// # Errors
/// Bad input; a failed run where a seed leaves a trace, whose number is then in the error.
pub fn run(args: &ChaosArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let recipe = match args.partitions {
        true => args.endless()?,
        false => args.recipe.resolve()?,
    };
    std::fs::create_dir_all(&args.out)
        .map_err(|error| Failure::bad_input(anyhow!("cannot create {}: {error}", args.out.display())))?;
    let mut say =
        |line: String| writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Failure::internal);
    let program = std::env::current_exe().map_err(Failure::internal)?;
    let stop = Stop::on(launch::reasons_to_leave().map_err(Failure::internal)?);
    if args.partitions {
        return run_divided(args, &recipe, &program, &stop, &mut say);
    }
    if args.corrupt {
        args.may_corrupt(&recipe)?;
    }
    if args.aimed {
        args.may_aim(&recipe)?;
    }
    let plan = |name: &str, aim: Option<&Aim>| Plan {
        program: program.clone(),
        train: args.train(aim),
        out: args.out.join(name),
        timeout: recipe.plan.elastic.timeout,
        limit: Duration::from_secs(args.limit),
    };
    let undisturbed = end_of(&plan("undisturbed", None), &Trouble::default(), &stop)?.events;
    let reference = Reference::of(&undisturbed, recipe.plan.batch.micro_batches()).map_err(failed)?;
    say(format!("undisturbed: {} steps on {} workers", recipe.plan.steps, args.workers()))?;
    for seed in args.seed..args.seed + u64::from(args.seeds.get()) {
        let aim = args.aimed.then(|| aim(seed, args.fixed(&recipe), recipe.plan.steps));
        if let Some(aim) = &aim {
            say(format!("seed {seed}: {aim}"))?;
        }
        let plan = plan(&format!("seed-{seed}"), aim.as_ref());
        let trouble = args.trouble(seed, aim.as_ref(), recipe.plan.steps);
        let held = end_of(&plan, &trouble, &stop).and_then(|ended| {
            let report = reference.audit(&ended.events, &trouble.harm(ended.harm));
            report.map_err(|error| failed(format!("{error}\n  {}", ended.said.join("\n  "))))
        });
        match held {
            Ok(report) => say(format!("seed {seed}: {}", text(&report)))?,
            Err(Failure { exit, error }) => {
                let error = anyhow!("seed {seed}: {error}\n  its log is {}", log_of(&plan.out).display());
                return Err(Failure { exit, error });
            }
        }
    }
    say(format!("all {} left no trace", args.seeds))?;
    Ok(Exit::Done)
}

/// What a seed does to a run.
#[derive(Debug, Default)]
struct Trouble {
    faults: Vec<Fault>,
    flip: Option<Flip>,
    aim: Option<Aim>,
}

impl Trouble {
    /// What of it the run's own processes do to themselves.
    fn planted(&self) -> Vec<Planted> {
        let death = self.aim.map(|aim| aim.death).filter(|death| death.moment != Moment::Any);
        self.flip.map(Planted::Flip).into_iter().chain(death.map(Planted::Death)).collect()
    }

    /// All that was done to a run, after what was done to its processes.
    fn harm(&self, done: Harm) -> Harm {
        let (death, held) = (self.aim.map(|aim| aim.death), self.aim.is_some_and(|aim| aim.is_held()));
        let all_died = done.all_died || self.aim.is_some_and(|aim| aim.workers == 1);
        Harm { all_died, flip: self.flip, death, held, ..done }
    }
}

/// The same with hosts whose ways to each other are cut.
fn run_divided(
    args: &ChaosArgs,
    recipe: &Resolved,
    program: &Path,
    stop: &Stop,
    say: &mut impl FnMut(String) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    if let Some(obstacle) = Hosts::obstacle() {
        return Err(Failure::bad_input(anyhow!("--partitions: {obstacle}")));
    }
    let workers = args.workers() as usize;
    let plan = |name: &str| divided::Plan {
        program: program.to_owned(),
        recipe: recipe.text.clone(),
        out: std::path::absolute(args.out.join(name)).unwrap_or_else(|_| args.out.join(name)),
        workers,
        timeout: recipe.plan.elastic.timeout,
        limit: Duration::from_secs(args.limit),
    };
    let of_seed = |seed: u64, error: String| failed(format!("seed {seed}: {error}"));
    let broken_off = |seed: u64, error: io::Error, log: PathBuf| match Stop::is(&error) {
        true => ended_early(error),
        false => of_seed(seed, format!("{error}\n  its log is {}", log.display())),
    };
    let mut ended = Vec::new();
    for seed in args.seed..args.seed + u64::from(args.seeds.get()) {
        let plan = plan(&format!("divided-{seed}"));
        let run = divide(&plan, &partitions(seed, workers, args.faults), 0, stop);
        let run = run.map_err(|error| broken_off(seed, error, log_of(&plan.out)))?;
        let last =
            of_kind(&run.events, "step").filter_map(|step| step["step"].as_u64()).next_back().unwrap_or(0);
        ended.push((seed, run, last));
    }
    let last = ended.iter().map(|(_, _, last)| *last).max().unwrap_or(0);
    let undisturbed = divide(&plan("undivided"), &[], last, stop).map_err(ended_early)?;
    let reference = Reference::of(&undisturbed.events, recipe.plan.batch.micro_batches()).map_err(failed)?;
    for (seed, run, last) in &ended {
        let audited = reference.up_to(*last).and_then(|until| until.audit(&run.events, &run.harm));
        let report =
            audited.map_err(|error| of_seed(*seed, format!("{error}\n  {}", run.said.join("\n  "))))?;
        let text = text(&report);
        say(format!(
            "seed {seed}: {} cuts, {} rings while they healed in time; {text}",
            run.said.len(),
            run.rings_of_short
        ))?;
    }
    say(format!("all {} left no trace", args.seeds))?;
    Ok(Exit::Done)
}

impl ChaosArgs {
    /// The recipe, with more steps than are ever done.
    fn endless(&self) -> Result<Resolved, Failure> {
        let mut file = RecipeFile { recipe: self.recipe.recipe.clone(), sets: self.recipe.sets.clone() };
        file.sets.push("train.steps=1000000".to_owned());
        file.resolve_for_run()
    }

    fn workers(&self) -> u32 {
        self.workers.map_or(WORKERS, NonZeroU32::get)
    }

    /// What a seed does not draw.
    fn fixed(&self, recipe: &Resolved) -> Fixed {
        let is_set = |key: &str| self.recipe.sets.iter().any(|set| set.trim_start().starts_with(key));
        let parallel = &recipe.plan.parallel;
        Fixed {
            shard: is_set("parallel.shard").then_some(parallel.shard),
            buddies: is_set("parallel.buddies").then_some(parallel.buddies),
            workers: self.workers.map(NonZeroU32::get),
        }
    }

    /// What this seed does to a run of so many steps.
    fn trouble(&self, seed: u64, aim: Option<&Aim>, steps: u64) -> Trouble {
        let delay_max = Duration::from_millis(self.delay);
        if let Some(aim) = aim {
            let faults = kill(seed, aim, delay_max).into_iter().collect();
            return Trouble { faults, flip: None, aim: Some(*aim) };
        }
        let flip = self.corrupt.then(|| flip(seed, self.workers().into()));
        let first = flip.map_or(1, |flip| flip.step);
        let limits = Limits { steps, first, faults: self.faults, delay_max };
        Trouble { faults: schedule(seed, limits), flip, aim: None }
    }

    /// Refuses where nobody would die at the moment that is aimed at.
    fn may_aim(&self, recipe: &Resolved) -> Result<(), Failure> {
        let obstacle = if !cfg!(debug_assertions) {
            RELEASED.to_owned()
        } else if recipe.plan.steps < STEPS_MIN {
            format!("needs {STEPS_MIN} steps: add --set train.steps={STEPS_MIN}")
        } else {
            return Ok(());
        };
        Err(Failure::bad_input(anyhow!("--aimed: {obstacle}")))
    }

    /// Refuses where a bit that flips would not be found, or never flips.
    fn may_corrupt(&self, recipe: &Resolved) -> Result<(), Failure> {
        let obstacle = if !cfg!(debug_assertions) {
            RELEASED.to_owned()
        } else if self.workers() < 3 {
            "needs three workers, or nobody can say who is right: add --workers 3".to_owned()
        } else if recipe.plan.parallel.shard != Shard::None {
            "needs parallel.shard = \"none\": of a state that is divided nobody else has the same".to_owned()
        } else if recipe.plan.steps < FLIP_STEPS_MIN {
            format!("needs {FLIP_STEPS_MIN} steps: add --set train.steps={FLIP_STEPS_MIN}")
        } else {
            return Ok(());
        };
        Err(Failure::bad_input(anyhow!("--corrupt: {obstacle}")))
    }

    /// What `train` is given, but for the folder.
    fn train(&self, aim: Option<&Aim>) -> Vec<OsString> {
        let mut train: Vec<OsString> = vec![self.recipe.recipe.clone().into()];
        let workers = aim.map_or_else(|| self.workers(), |aim| aim.workers).to_string();
        train.extend(["--device".into(), "cpu".into(), "--workers".into(), workers.into()]);
        let drawn = aim.map(Aim::sets).into_iter().flatten();
        for set in self.recipe.sets.iter().cloned().chain(drawn) {
            train.extend(["--set".into(), set.into()]);
        }
        train
    }
}

/// Runs a run under this, which must end well.
fn end_of(plan: &Plan, trouble: &Trouble, stop: &Stop) -> Result<Ended, Failure> {
    let ended = disturb(plan, &trouble.faults, &trouble.planted(), stop).map_err(ended_early)?;
    match ended.status.success() {
        true => Ok(ended),
        false => Err(failed(format!("train ended with {}\n  {}", ended.status, ended.said.join("\n  ")))),
    }
}

/// A run that came to no end of its own.
fn ended_early(error: io::Error) -> Failure {
    let exit = if Stop::is(&error) { Exit::Interrupted } else { Exit::RunFailed };
    Failure { exit, error: error.into() }
}

fn failed(why: String) -> Failure {
    Failure::run(anyhow!(why))
}

/// What a run went through, on one line.
fn text(report: &Report) -> String {
    let mut recoveries = report.recoveries_ms.clone();
    recoveries.sort_by(f64::total_cmp);
    let longest = recoveries.last().copied().unwrap_or(0.0);
    let median = recoveries.get(recoveries.len() / 2).copied().unwrap_or(0.0);
    let corrupted = if report.corrupted > 0 { ", memory that failed was found" } else { "" };
    format!(
        "{} steps with the same bits in {} rings, {} restarts from storage{corrupted}; from ring to ring {median:.0} ms \
         (median), {longest:.0} ms (longest)",
        report.steps, report.rings, report.restores
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_one_line() {
        let report =
            Report { steps: 9, rings: 4, restores: 1, corrupted: 0, recoveries_ms: vec![30.0, 10.0, 20.0] };
        assert_eq!(
            text(&report),
            "9 steps with the same bits in 4 rings, 1 restarts from storage; from ring to ring 20 ms (median), 30 ms \
             (longest)"
        );
    }
}
