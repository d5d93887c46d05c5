//! `mattock train`: a whole run on this machine, from recipe to summary.
//!
//! This process holds the run's folder and shows progress; a coordinator and workers, started from the same
//! executable, do the work. What needs tensors, data or object storage is behind [`Parts`].

use std::ffi::OsString;
use std::io::{self, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::anyhow;
use clap::Args;
use mattock_collectives::TransportChoice;
use mattock_worker::plan::Shard;

use super::nodes::{NodeArgs, follow};
use super::recipe::RecipeFile;
use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::launch::{Deadlines, Ended, LaunchError, Line, Listening, LocalRun, Place, Program, stop_signals};
use crate::progress::{Event, Mode, Progress, RunEnded, RunOutcome, Summary};
use crate::recipe::Resolved;
use crate::run_dir::{EventLog, Reuse, RunDir, RunDirError, RunRecord, secret_of};

/// Coordinators that may die in a row without a step in between, before the run is given up.
const RESTARTS: u32 = 5;

const EXAMPLES: &str = "\
Examples:
  mattock train configs/quickstart.toml
  mattock train configs/quickstart.toml --workers 4 --set train.steps=1000
  mattock train configs/quickstart.toml --out runs/first --resume
  srun mattock train configs/quickstart.toml --out /shared/runs/first --resume-if-any --workers 4
";

/// Train a model as a recipe says, with a coordinator and workers on this machine
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct TrainArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Worker processes to start on each machine; the result is the same for any number
    #[arg(long, value_name = "N", default_value = "2")]
    pub workers: NonZeroU32,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// What carries gradients: auto (shared memory), quic or shm
    #[arg(long, value_name = "TRANSPORT", default_value = "auto")]
    pub transport: TransportChoice,
    /// Do not start another worker in the place of one that has ended: the run goes on with fewer
    #[arg(long)]
    pub no_respawn: bool,
    /// Let a second worker compute this share of all micro-batches too, such as 0.01: a device that computes wrongly is found
    #[arg(long, value_name = "SHARE")]
    pub audit: Option<f64>,
    /// The run's folder [default: a fresh runs/NAME-DATE-TIME]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on from the newest checkpoint, or from that of STEP
    #[arg(long, value_name = "STEP", num_args = 0..=1, require_equals = true)]
    pub resume: Option<Option<u64>>,
    /// Go on from the newest checkpoint, or start afresh where there is none: for jobs that are started again as they are
    #[arg(long, conflicts_with_all = ["resume", "overwrite"])]
    pub resume_if_any: bool,
    /// Remove what --out and the checkpoint prefix hold, and start afresh
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
    /// Which machine of how many this is.
    #[command(flatten)]
    pub nodes: NodeArgs,
    /// Print one JSON object about the run on standard output at the end
    #[arg(long)]
    pub json: bool,
}

/// What `train` needs of the parts that know tensors, data and object storage.
pub trait Parts {
    /// Checks the task's tables, and builds the dataset where there is none; returns the dataset's hash.
    ///
    /// # Errors
    /// Bad input where the task or the data refuse.
    fn prepare(&self, recipe: &Resolved) -> Result<String, Failure>;

    /// Refuses, accepts or clears what lies under the checkpoint prefix; returns the run's id.
    ///
    /// # Errors
    /// Bad input where another run's checkpoints are there, or to resume, none.
    fn claim_checkpoints(&self, url: &str, reuse: Reuse) -> Result<String, Failure>;

    /// A few lines sampled from the model in a checkpoint; none where the task has no text to show.
    fn sample(&self, recipe: &Resolved, checkpoint: &str) -> Option<String>;
}

/// Runs `mattock train`; `out` is standard output. Must be called from the main thread: the processes that
/// it starts die with it.
///
/// # Errors
/// Bad input before anything is started; a failed run after.
pub fn run(args: &TrainArgs, parts: &impl Parts, out: &mut impl Write) -> Result<Exit, Failure> {
    let recipe = args.recipe_with_audit().resolve_for_run()?;
    let place = args.nodes.place()?;
    args.check(&recipe, &place)?;
    if place.nodes > 1 {
        eprintln!("{place}");
    }
    if !place.leads() {
        parts.prepare(&recipe)?;
        return follow(args, &recipe, &place);
    }
    lead(args, parts, out, &recipe, &place)
}

/// Runs the coordinator's side, and this machine's workers.
fn lead(
    args: &TrainArgs,
    parts: &impl Parts,
    out: &mut impl Write,
    recipe: &Resolved,
    place: &Place,
) -> Result<Exit, Failure> {
    let record = RunRecord::new(parts.prepare(recipe)?);
    let dir = RunDir::open(
        args.out.as_deref(),
        &recipe.plan.name,
        args.reuse(),
        jiff::ZonedDateTime::now().datetime(),
    )?;
    // What an earlier attempt left must not be taken for this one's.
    let token = args.nodes.token_file(dir.path());
    let _ = std::fs::remove_file(&token);
    let _ = std::fs::remove_file(secret_of(dir.path()));
    for change in dir.check_resumable(recipe, &record)? {
        eprintln!("resumed with another recipe: {change}");
    }
    let run = parts.claim_checkpoints(&dir.checkpoints(recipe), args.reuse())?;
    dir.save(recipe, &record)?;

    let run = args.processes(recipe, &dir, &token, &run, place)?;
    let (ended, watch) = train(run, &dir)?;
    let summary =
        Summary::new(watch.progress.meter(), &watch.ended.clone().unwrap_or_default(), Instant::now());
    eprint!("\n{}", summary.to_text(dir.path()));
    let exit = verdict(&ended, watch.ended.as_ref());
    match (exit, summary.checkpoints.last()) {
        (Exit::Done, Some(checkpoint)) => {
            // A model that no worker holds as a whole is not loaded here either.
            if recipe.plan.parallel.shard != Shard::Full
                && let Some(text) = parts.sample(recipe, checkpoint)
            {
                eprintln!("\n{text}");
            }
        }
        (Exit::Done, None) => {}
        (_, Some(_)) => eprintln!("\nto go on: {}", args.resume_command(dir.path())),
        (_, None) => eprintln!("\nno checkpoint was written"),
    }
    if args.json {
        let json = serde_json::to_string(&summary).map_err(Failure::internal)?;
        writeln!(out, "{json}").map_err(Failure::internal)?;
    }
    match exit {
        Exit::Done | Exit::Interrupted => Ok(exit),
        _ => Err(Failure { exit, error: anyhow!(why(&ended, watch.ended.as_ref())) }),
    }
}

impl TrainArgs {
    /// The recipe, with the share that is audited laid over it.
    fn recipe_with_audit(&self) -> RecipeFile {
        let mut recipe = self.recipe.clone();
        recipe.sets.extend(self.audit.map(|share| format!("elastic.audit={share:?}")));
        recipe
    }

    fn check(&self, recipe: &Resolved, place: &Place) -> Result<(), Failure> {
        let (elastic, workers) = (&recipe.plan.elastic, self.all_workers(place).get());
        if !(elastic.min_workers..=elastic.max_workers).contains(&workers) {
            let each = self.workers;
            let each = if place.nodes > 1 {
                format!("{each} on each of {} nodes", place.nodes)
            } else {
                each.to_string()
            };
            return Err(Failure::bad_input(anyhow!(
                "--workers {each} is outside of what the recipe allows: {} to {} \
                    (`elastic.min_workers`, `elastic.max_workers`)",
                elastic.min_workers,
                elastic.max_workers
            )));
        }
        if place.nodes > 1 && self.out.is_none() {
            return Err(Failure::bad_input(anyhow!(
                "{place} needs --out DIR, a folder that all nodes share: the join token is passed on there"
            )));
        }
        if self.resume.is_some() && self.out.is_none() && recipe.plan.checkpoint.to.contains("{out}") {
            return Err(Failure::bad_input(anyhow!(
                "--resume needs --out DIR: this recipe's checkpoints lie in the run's folder \
                    (`checkpoint.to`)"
            )));
        }
        Ok(())
    }

    fn reuse(&self) -> Reuse {
        match (self.resume.is_some(), self.resume_if_any, self.overwrite) {
            (true, ..) => Reuse::Resume,
            (_, true, _) => Reuse::ResumeIfAny,
            (_, _, true) => Reuse::Overwrite,
            (false, false, false) => Reuse::Refuse,
        }
    }

    /// Workers of all machines.
    fn all_workers(&self, place: &Place) -> NonZeroU32 {
        self.workers.saturating_mul(NonZeroU32::new(place.nodes).unwrap_or(NonZeroU32::MIN))
    }

    /// What the user types to go on.
    fn resume_command(&self, folder: &Path) -> String {
        let sets: String = self.recipe.sets.iter().map(|set| format!(" --set {}", quoted(set))).collect();
        format!(
            "mattock train {} --out {} --resume{sets}",
            quoted(&self.recipe.recipe.to_string_lossy()),
            quoted(&folder.to_string_lossy())
        )
    }

    /// The processes of the run in `dir`.
    fn processes(
        &self,
        recipe: &Resolved,
        dir: &RunDir,
        token: &Path,
        run: &str,
        place: &Place,
    ) -> Result<LocalRun, Failure> {
        let mut coordinator: Vec<OsString> = vec!["coordinator".into(), dir.recipe_path().into()];
        coordinator.extend(["--out".into(), dir.path().into(), "--token-file".into(), token.into()]);
        coordinator.extend(["--workers".into(), self.all_workers(place).to_string().into()]);
        coordinator.extend(["--listen".into(), self.nodes.listen(place)?.to_string().into()]);
        coordinator.extend(["--run".into(), run.into(), "--supervised".into()]);
        match self.resume {
            Some(Some(step)) => coordinator.push(format!("--resume={step}").into()),
            Some(None) => coordinator.push("--resume".into()),
            None if self.resume_if_any => coordinator.push("--resume-if-any".into()),
            None => {}
        }
        let (worker, token) = (self.worker_program()?, token.to_owned());
        let worker = move |index: u32, listening: &Listening| {
            let mut program = worker(index);
            program.args.extend(["--coordinator".into(), listening.address.to_string().into()]);
            program.args.extend(["--token-file".into(), token.clone().into()]);
            program
        };
        let deadlines = Deadlines::new(recipe.plan.elastic.timeout);
        Ok(LocalRun {
            coordinator: Program::this(coordinator).map_err(Failure::internal)?,
            workers: self.workers,
            worker: Box::new(worker),
            respawn: !self.no_respawn,
            restarts: RESTARTS,
            deadlines: if place.nodes > 1 { deadlines.with_others(self.nodes.wait()) } else { deadlines },
        })
    }

    /// Names the program of each of this machine's workers, but not what it joins.
    pub(super) fn worker_program(&self) -> Result<impl Fn(u32) -> Program + use<>, Failure> {
        let this = Program::this::<OsString>([]).map_err(Failure::internal)?;
        let (device, transport) = (self.device.clone(), self.transport.to_string());
        Ok(move |index: u32| {
            let mut args: Vec<OsString> = vec!["worker".into(), "--supervised".into()];
            args.extend(["--device".into(), device.clone().into()]);
            args.extend(["--transport".into(), transport.clone().into()]);
            args.extend(["--local-rank".into(), index.to_string().into()]);
            Program { args, ..this.clone() }
        })
    }
}

/// Starts the processes and watches them until all are gone.
fn train(run: LocalRun, dir: &RunDir) -> Result<(Ended, Watch), Failure> {
    let mut watch = Watch::new(dir.events()?);
    // On this very thread: the kernel ties children to the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(Failure::internal)?.block_on(async {
        let stops = stop_signals().map_err(Failure::internal)?;
        run.supervise(stops, |line| watch.line(line)).await.map_err(|error| match error {
            LaunchError::NeverListened { code, .. } if is_bad_input(code) => Failure::bad_input(error),
            LaunchError::NeverListened { .. } => Failure::run(error),
            error => Failure::internal(error),
        })
    })?;
    match watch.log_failure.take() {
        Some(error) => Err(Failure::internal(error)),
        None => Ok((ended, watch)),
    }
}

/// What is done with each line that the processes print.
struct Watch {
    progress: Progress<io::Stderr>,
    log: EventLog,
    /// Writing events failed, which must not end a run that trains.
    log_failure: Option<RunDirError>,
    ended: Option<RunEnded>,
}

impl Watch {
    fn new(log: EventLog) -> Self {
        let progress = Progress::new(io::stderr(), Mode::of_stderr(), Instant::now());
        Self { progress, log, log_failure: None, ended: None }
    }

    fn line(&mut self, line: Line<'_>) {
        // A closed standard error must not end a run either.
        let _ = match line {
            Line::Said(role, text) => self.progress.line(&format!("[{role}] {text}")),
            Line::Event(text) => match serde_json::from_str::<Event>(text) {
                // One that took over may tell again what the one before it had told.
                Ok(event) if self.progress.meter().knows(&event) => Ok(()),
                Ok(event) => {
                    self.keep(text, &event);
                    self.progress.absorb(Instant::now(), &event)
                }
                Err(error) => {
                    self.progress.line(&format!("the coordinator printed no event ({error}): {text}"))
                }
            },
        };
    }

    fn keep(&mut self, text: &str, event: &Event) {
        let mut kept = Ok(());
        match event {
            Event::RunStarted { resumed_from, .. } => kept = self.log.rewind(*resumed_from),
            Event::RunEnded(ended) => self.ended = Some(ended.clone()),
            _ => {}
        }
        if let Err(error) = kept.and_then(|()| self.log.append(text)) {
            self.log_failure.get_or_insert(error);
        }
    }
}

/// How the program should end.
fn verdict(ended: &Ended, event: Option<&RunEnded>) -> Exit {
    let code = ended.coordinator.code();
    // It said how the run ended before that.
    let was_killed = code.is_none();
    match event.map(|event| event.outcome) {
        Some(RunOutcome::Done) if ended.coordinator.success() || was_killed => Exit::Done,
        // A worker that had to leave can stop a run too.
        Some(RunOutcome::Interrupted)
            if ended.stopped || was_killed || code == Some(Exit::Interrupted as i32) =>
        {
            Exit::Interrupted
        }
        None if is_bad_input(code) => Exit::BadInput,
        _ => Exit::RunFailed,
    }
}

fn is_bad_input(code: Option<i32>) -> bool {
    code == Some(i32::from(Exit::BadInput as u8))
}

/// Why a run failed: what the coordinator said, else how it ended.
fn why(ended: &Ended, event: Option<&RunEnded>) -> String {
    if let Some(error) = event.and_then(|event| event.error.clone()) {
        return error;
    }
    match ended.killed {
        Some(why) => format!("the run was killed: {why}"),
        None => format!("the coordinator ended ({}) without saying why", ended.coordinator),
    }
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn ended(code: i32, stopped: bool) -> Ended {
        Ended { coordinator: ExitStatus::from_raw(code << 8), workers: vec![], stopped, killed: None }
    }

    fn killed() -> Ended {
        Ended { coordinator: ExitStatus::from_raw(9), ..ended(0, false) }
    }

    fn event(outcome: RunOutcome) -> RunEnded {
        RunEnded { outcome, ..RunEnded::default() }
    }

    #[test]
    fn the_exit_code_says_how_the_run_ended() {
        for (ended, outcome, exit) in [
            (ended(0, false), Some(RunOutcome::Done), Exit::Done),
            (ended(0, true), Some(RunOutcome::Done), Exit::Done),
            (ended(0, true), Some(RunOutcome::Interrupted), Exit::Interrupted),
            (ended(130, false), Some(RunOutcome::Interrupted), Exit::Interrupted),
            (ended(3, false), Some(RunOutcome::Failed), Exit::RunFailed),
            (ended(1, false), Some(RunOutcome::Done), Exit::RunFailed),
            (killed(), Some(RunOutcome::Done), Exit::Done),
            (killed(), Some(RunOutcome::Interrupted), Exit::Interrupted),
            (killed(), Some(RunOutcome::Failed), Exit::RunFailed),
            (killed(), None, Exit::RunFailed),
            (ended(2, false), None, Exit::BadInput),
            (ended(0, false), None, Exit::RunFailed),
            (ended(0, true), None, Exit::RunFailed),
        ] {
            assert_eq!(verdict(&ended, outcome.map(event).as_ref()), exit, "{ended:?} {outcome:?}");
        }
    }

    fn one() -> Place {
        Place { rank: 0, nodes: 1, why: String::new() }
    }

    fn args(sets: &[&str], resume: Option<Option<u64>>) -> TrainArgs {
        let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml").into();
        TrainArgs {
            recipe: RecipeFile { recipe, sets: sets.iter().map(ToString::to_string).collect() },
            workers: NonZeroU32::new(9).unwrap(),
            device: "cpu".into(),
            transport: TransportChoice::Auto,
            no_respawn: false,
            audit: None,
            out: None,
            resume,
            resume_if_any: false,
            nodes: NodeArgs::default(),
            overwrite: false,
            json: false,
        }
    }

    #[test]
    fn what_the_recipe_does_not_allow_is_bad_input() {
        let refusal = |args: TrainArgs| {
            let failure = args.check(&args.recipe.resolve().unwrap(), &one()).unwrap_err();
            assert_eq!(failure.exit, Exit::BadInput);
            failure.to_string()
        };
        assert!(refusal(args(&["elastic.max_workers=8"], None)).contains("--workers 9 is outside"));
        assert!(refusal(args(&["elastic.max_workers=9"], Some(None))).contains("--resume needs --out"));
        let elsewhere = args(&["elastic.max_workers=9", "checkpoint.to=s3://b/p"], Some(None));
        elsewhere.check(&elsewhere.recipe.resolve().unwrap(), &one()).unwrap();
    }

    #[test]
    fn the_resume_command_can_be_pasted() {
        let args = args(&["name=it's"], None);
        let command = args.resume_command(Path::new("my runs/a"));
        assert!(command.ends_with(r"--out 'my runs/a' --resume --set 'name=it'\''s'"), "{command}");
    }
}
