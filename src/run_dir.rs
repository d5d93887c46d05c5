//! The run's folder: what makes a run reproducible, and what happened in it.
//!
//! ```text
//! runs/NAME-DATE-TIME/
//!   recipe.toml    the resolved recipe, with origins
//!   run.json       program, Cargo.lock's hash, dataset's hash; its presence says that the folder holds a run
//!   events.jsonl   one JSON object a line: every step, and what else happened
//!   lock           held by the process that runs it
//!   secret         what its coordinators have in common; 0600, and only while the run is under way
//! ```
//!
//! # Invariants
//! 1. A folder that holds a run is never written to by another one, unless the user says which of the two
//!    ways on.
//! 2. One process runs in a folder at a time.
//! 3. Nothing is removed but what a run wrote.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::recipe::{RecipeError, Resolved};

const RECIPE: &str = "recipe.toml";
const RECORD: &str = "run.json";
/// What its coordinators have in common, while it is under way.
const SECRET: &str = "secret";
const EVENTS: &str = "events.jsonl";
const LOCK: &str = "lock";
/// Where runs go without `--out`.
const RUNS: &str = "runs";
/// Fresh folders tried in one second before giving up.
const FRESH_TRIES_MAX: u32 = 100;
/// Increased when an older program could not read what is in the folder.
const FORMAT: u32 = 1;
/// Exactly the dependencies that this program was built from.
const CARGO_LOCK: &[u8] = include_bytes!("../Cargo.lock");

/// What to do where the folder holds a run already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// Leave it alone: an error.
    Refuse,
    /// Go on with it (`--resume`). A folder without a run will do: the checkpoints may lie elsewhere.
    Resume,
    /// Go on with it, or start afresh where nothing is (`--resume-if-any`).
    ResumeIfAny,
    /// Remove it (`--overwrite`).
    Overwrite,
}

/// Why a folder can't be used for a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// Somebody's run is in there.
    #[error("{} holds a run already: --resume goes on with it, --overwrite removes it and starts \
        afresh", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// `--resume` with a recipe that means another run.
    #[error(
        "cannot resume {}: `{key}` was {was} and is {is} now ({origin}); change it back, or start in another folder",
        path.display()
    )]
    AnotherRun {
        /// The folder.
        path: PathBuf,
        /// What differs.
        key: String,
        /// In the folder.
        was: String,
        /// As given now.
        is: String,
        /// Where it is written now.
        origin: String,
    },
    /// Another process is at work in it.
    #[error("another process is running in {}: wait for it, stop it, or use another folder", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// Its record is not one of ours, or of a newer program.
    #[error("cannot read {}: {problem}; --overwrite removes the run", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The recipe in it is damaged.
    #[error("the saved recipe is damaged: {0}; --overwrite removes the run")]
    Recipe(#[from] RecipeError),
    /// The file system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What is recorded of a run beside its recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of the folder's layout.
    format: u32,
    /// The program's version.
    pub program: String,
    /// BLAKE3 of the Cargo.lock that the program was built from, as hexadecimal digits.
    pub cargo_lock: String,
    /// Hash of the dataset's manifest, as hexadecimal digits.
    pub dataset: String,
}

impl RunRecord {
    /// A run of this program on the dataset with this hash.
    pub fn new(dataset: impl Into<String>) -> Self {
        Self {
            format: FORMAT,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            cargo_lock: blake3::hash(CARGO_LOCK).to_hex().to_string(),
            dataset: dataset.into(),
        }
    }
}

/// A run's folder, held by this process until dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Unlocks when dropped.
    _lock: File,
}

impl RunDir {
    /// Opens `out`, or a fresh `runs/NAME-DATE-TIME`, and holds it. Nothing is written but the lock; with
    /// [`Reuse::Overwrite`] what the last run wrote is removed, its checkpoints excepted, which may lie
    /// elsewhere.
    ///
    /// # Errors
    /// Where the folder is in use, or holds a run that is to be left alone.
    pub fn open(
        out: Option<&Path>,
        name: &str,
        reuse: Reuse,
        now: jiff::civil::DateTime,
    ) -> Result<Self, RunDirError> {
        let path = match out {
            Some(out) => {
                fs::create_dir_all(out).map_err(failed("create", out))?;
                out.to_owned()
            }
            None => fresh(Path::new(RUNS), name, now)?,
        };
        let path = std::path::absolute(&path).map_err(failed("find", &path))?;
        let dir = Self { _lock: lock(&path)?, path };
        let occupied = dir.record_path().exists();
        match reuse {
            Reuse::Refuse if occupied => Err(RunDirError::Occupied { path: dir.path }),
            Reuse::Overwrite => dir.clear().map(|()| dir),
            Reuse::Refuse | Reuse::Resume | Reuse::ResumeIfAny => Ok(dir),
        }
    }

    /// The folder, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the resolved recipe is.
    pub fn recipe_path(&self) -> PathBuf {
        self.path.join(RECIPE)
    }

    /// Writes what makes the run reproducible; from here on the folder holds a run.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn save(&self, recipe: &Resolved, record: &RunRecord) -> Result<(), RunDirError> {
        write(&self.recipe_path(), recipe.text.as_bytes())?;
        let json = serde_json::to_string_pretty(record)
            .map_err(|error| failed("write", &self.record_path())(io::Error::other(error)))?;
        write(&self.record_path(), format!("{json}\n").as_bytes())
    }

    /// Whether the run in the folder can go on as `recipe` says: seed, model and batch must be the same,
    /// and so must the dataset. Other keys may change; those that did are returned, as `key: was -> is`.
    /// Without a run, nothing is refused.
    ///
    /// # Errors
    /// Naming the first key that means another run.
    pub fn check_resumable(&self, recipe: &Resolved, record: &RunRecord) -> Result<Vec<String>, RunDirError> {
        if !self.record_path().exists() {
            return Ok(Vec::new());
        }
        let (saved_recipe, saved) = self.load()?;
        let another = |key: &str, was: String, is: String, origin: String| RunDirError::AnotherRun {
            path: self.path.clone(),
            key: key.to_owned(),
            was,
            is,
            origin,
        };
        if saved.dataset != record.dataset {
            return Err(another("data", saved.dataset, record.dataset.clone(), "the dataset's hash".into()));
        }
        let mut notes = Vec::new();
        for change in recipe.changes_since(&saved_recipe) {
            let table = change.key.split('.').next().unwrap_or_default();
            // What is computed again has the same bits.
            if ["seed", "model", "batch"].contains(&table) && change.key != "model.recompute" {
                return Err(another(&change.key, change.was, change.is, change.origin));
            }
            notes.push(format!("{}: {} -> {}", change.key, change.was, change.is));
        }
        Ok(notes)
    }

    /// The log of events, to append to.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn events(&self) -> Result<EventLog, RunDirError> {
        EventLog::open(self.path.join(EVENTS))
    }

    /// Where the recipe's checkpoints go: `{out}` becomes this folder.
    pub fn checkpoints(&self, recipe: &Resolved) -> String {
        checkpoints_of(&recipe.plan.checkpoint.to, &self.path)
    }

    fn load(&self) -> Result<(Resolved, RunRecord), RunDirError> {
        let path = self.record_path();
        let unreadable = |problem: String| RunDirError::Record { path: path.clone(), problem };
        let json = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let record: RunRecord = serde_json::from_str(&json).map_err(|error| unreadable(error.to_string()))?;
        if record.format != FORMAT {
            return Err(unreadable(format!(
                "it is of format {}, and this program writes {FORMAT}",
                record.format
            )));
        }
        Ok((Resolved::load(&self.recipe_path(), &[])?, record))
    }

    fn record_path(&self) -> PathBuf {
        self.path.join(RECORD)
    }

    fn clear(&self) -> Result<(), RunDirError> {
        // The record goes last: until then the folder holds a run.
        for name in [EVENTS, RECIPE, RECORD] {
            let path = self.path.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The run's events, one JSON object a line.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
}

impl EventLog {
    fn open(path: PathBuf) -> Result<Self, RunDirError> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = file.map_err(failed("open", &path))?;
        Ok(Self { path, file })
    }

    /// Appends one line, without its newline.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn append(&mut self, line: &str) -> Result<(), RunDirError> {
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(failed("write", &self.path))
    }

    /// Forgets what came after `step`, and a line that was torn: a run that resumes there repeats those
    /// steps.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn rewind(&mut self, step: u64) -> Result<(), RunDirError> {
        #[derive(Deserialize)]
        struct Line {
            event: String,
            step: Option<u64>,
        }
        let keeps = |line: &str| {
            serde_json::from_str(line)
                .is_ok_and(|line: Line| line.event != "step" || line.step.is_none_or(|at| at <= step))
        };
        let kept_path = self.path.with_extension("kept");
        let rewrite = || -> io::Result<()> {
            (&self.file).rewind()?;
            let mut kept = BufWriter::new(File::create(&kept_path)?);
            for line in BufReader::new(&self.file).lines() {
                let line = line?;
                if keeps(&line) {
                    writeln!(kept, "{line}")?;
                }
            }
            kept.flush()?;
            fs::rename(&kept_path, &self.path)
        };
        rewrite().map_err(failed("rewind", &self.path))?;
        *self = Self::open(std::mem::take(&mut self.path))?;
        Ok(())
    }
}

/// A folder that nobody else has, named after the run and the time.
fn fresh(runs: &Path, name: &str, now: jiff::civil::DateTime) -> Result<PathBuf, RunDirError> {
    fs::create_dir_all(runs).map_err(failed("create", runs))?;
    let stem = format!("{name}-{}", now.strftime("%Y%m%d-%H%M%S"));
    let mut path = runs.join(&stem);
    for number in 2..FRESH_TRIES_MAX {
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                path = runs.join(format!("{stem}-{number}"));
            }
            Err(error) => return Err(failed("create", &path)(error)),
        }
    }
    Err(RunDirError::Occupied { path })
}

fn lock(folder: &Path) -> Result<File, RunDirError> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(failed("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RunDirError::Busy { path: folder.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}

/// All of it or nothing.
fn write(path: &Path, bytes: &[u8]) -> Result<(), RunDirError> {
    let new = path.with_extension("new");
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, path)).map_err(failed("write", path))
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> RunDirError {
    move |source| RunDirError::Io { action, path: path.to_owned(), source }
}

/// Whether a folder holds a run.
pub fn holds_run(folder: &Path) -> bool {
    folder.join(RECORD).is_file()
}

/// Where the secret of a run in `folder` lies, readable by its owner only.
pub fn secret_of(folder: &Path) -> PathBuf {
    folder.join(SECRET)
}

/// Where checkpoints of a run in `folder` go, given `checkpoint.to`.
pub fn checkpoints_of(to: &str, folder: &Path) -> String {
    to.replace("{out}", &folder.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const NOW: jiff::civil::DateTime = jiff::civil::date(2026, 3, 4).at(5, 6, 7, 0);

    fn recipe(more: &str) -> Resolved {
        let text = format!(
            "name = \"a\"\nmodel.family = \"gpt\"\nbatch = {{ size = 8, micro = 2 }}\noptimizer.lr = \
                1e-3\ntrain.steps = 10\n{more}"
        );
        Resolved::parse(&text, Path::new("a.toml")).unwrap()
    }

    fn open(folder: &TempDir, reuse: Reuse) -> Result<RunDir, RunDirError> {
        RunDir::open(Some(&folder.path().join("out")), "a", reuse, NOW)
    }

    /// A folder with a run on the dataset "d" in it.
    fn occupied() -> TempDir {
        let folder = TempDir::new().unwrap();
        open(&folder, Reuse::Refuse).unwrap().save(&recipe(""), &RunRecord::new("d")).unwrap();
        folder
    }

    #[test]
    fn a_folder_that_holds_a_run_is_refused_with_the_two_ways_on() {
        let folder = occupied();
        let message = open(&folder, Reuse::Refuse).unwrap_err().to_string();
        assert!(message.contains("--resume") && message.contains("--overwrite"), "{message}");
    }

    #[test]
    fn a_run_can_be_resumed_with_what_does_not_make_it_another() {
        let folder = occupied();
        let dir = open(&folder, Reuse::Resume).unwrap();
        let notes = dir.check_resumable(&recipe("checkpoint.every = 7"), &RunRecord::new("d")).unwrap();
        assert_eq!(notes, ["checkpoint.every: 100 -> 7"]);
        for (more, dataset, said) in [
            ("model.layers = 3", "d", "`model.layers` was absent and is 3 now (a.toml:6)"),
            ("seed = 3", "d", "`seed` was 0 and is 3 now"),
            ("", "e", "`data` was d and is e now"),
        ] {
            let error = dir.check_resumable(&recipe(more), &RunRecord::new(dataset)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_run_can_be_resumed_in_a_folder_that_never_saw_it() {
        let dir = open(&TempDir::new().unwrap(), Reuse::Resume).unwrap();
        assert!(dir.check_resumable(&recipe("seed = 3"), &RunRecord::new("d")).unwrap().is_empty());
    }

    #[test]
    fn overwriting_removes_the_run_and_nothing_else() {
        let folder = occupied();
        fs::write(folder.path().join("out/mine.txt"), "mine").unwrap();
        let dir = open(&folder, Reuse::Overwrite).unwrap();
        assert!(!dir.recipe_path().exists() && dir.path().join("mine.txt").exists());
        drop(dir);
        open(&folder, Reuse::Refuse).unwrap();
    }

    #[test]
    fn one_process_runs_in_a_folder_at_a_time() {
        let folder = TempDir::new().unwrap();
        let _held = open(&folder, Reuse::Refuse).unwrap();
        assert!(matches!(open(&folder, Reuse::Overwrite), Err(RunDirError::Busy { .. })));
    }

    #[test]
    fn a_fresh_folder_is_named_after_the_run_and_the_time_and_never_shared() {
        let runs = TempDir::new().unwrap();
        let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(name(fresh(runs.path(), "a", NOW).unwrap()), "a-20260304-050607");
        assert_eq!(name(fresh(runs.path(), "a", NOW).unwrap()), "a-20260304-050607-2");
    }

    #[test]
    fn the_saved_recipe_says_the_same_and_the_record_names_the_lock() {
        let folder = occupied();
        let (saved, record) = open(&folder, Reuse::Resume).unwrap().load().unwrap();
        assert_eq!(saved.plan, recipe("").plan);
        assert_eq!(record.cargo_lock, blake3::hash(CARGO_LOCK).to_hex().to_string());
    }

    #[test]
    fn a_record_of_a_newer_program_is_refused() {
        let folder = occupied();
        let dir = open(&folder, Reuse::Resume).unwrap();
        dir.save(&recipe(""), &RunRecord { format: 9, ..RunRecord::new("d") }).unwrap();
        let message = dir.load().unwrap_err().to_string();
        assert!(message.contains("of format 9"), "{message}");
    }

    #[test]
    fn resuming_forgets_the_steps_that_will_be_repeated() {
        let folder = TempDir::new().unwrap();
        let dir = open(&folder, Reuse::Refuse).unwrap();
        let mut log = dir.events().unwrap();
        for step in 1..=4 {
            log.append(&format!("{{\"event\":\"step\",\"step\":{step}}}")).unwrap();
        }
        log.append("{\"event\":\"checkpoint\",\"step\":2}").unwrap();
        log.append("{\"event\":\"st").unwrap();
        log.rewind(2).unwrap();
        log.append("{\"event\":\"step\",\"step\":3}").unwrap();
        let kept = fs::read_to_string(dir.path().join(EVENTS)).unwrap();
        let steps: Vec<&str> = kept.lines().map(|line| &line[line.len() - 2..line.len() - 1]).collect();
        assert_eq!(steps, ["1", "2", "2", "3"], "{kept}");
    }

    #[test]
    fn checkpoints_go_to_the_folder_unless_the_recipe_says_otherwise() {
        let folder = TempDir::new().unwrap();
        let dir = open(&folder, Reuse::Refuse).unwrap();
        assert_eq!(dir.checkpoints(&recipe("")), format!("{}/checkpoints", dir.path().display()));
        assert_eq!(dir.checkpoints(&recipe("checkpoint.to = \"s3://b/p\"")), "s3://b/p");
    }
}
