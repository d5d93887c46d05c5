//! The events of a run that is under way, as they are appended to its file.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Follows the events of a run.
#[derive(Debug)]
pub struct Events {
    file: PathBuf,
    read: String,
    all: Vec<Value>,
}

impl Events {
    /// Of the run in that folder, which need not have any yet.
    pub fn of(run: &Path) -> Self {
        Self { file: run.join("events.jsonl"), read: String::new(), all: Vec::new() }
    }

    /// Reads what has been appended; or everything, where the run went back to a checkpoint and with it this file.
    ///
    /// # Errors
    /// Where the file cannot be read, or a whole line of it is no JSON.
    pub fn read(&mut self) -> io::Result<&[Value]> {
        let text = match std::fs::read_to_string(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        if text.get(..self.read.len()) != Some(&self.read) {
            self.read.clear();
            self.all.clear();
        }
        let new = &text[self.read.len()..];
        let whole = new.rfind('\n').map_or("", |end| &new[..=end]);
        for line in whole.lines() {
            self.all.push(serde_json::from_str(line)?);
        }
        self.read.push_str(whole);
        Ok(&self.all)
    }

    /// What was read so far.
    pub fn all(&self) -> &[Value] {
        &self.all
    }
}

/// Those of one kind.
pub fn of_kind<'a>(events: &'a [Value], kind: &'a str) -> impl DoubleEndedIterator<Item = &'a Value> {
    events.iter().filter(move |event| event["event"] == kind)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn whole_lines_are_read_once_and_all_again_where_the_file_went_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("events.jsonl");
        let mut events = Events::of(folder.path());
        let mut steps = |text: &str| {
            fs::write(&file, text).unwrap();
            let steps = events.read().unwrap().iter().map(|event| event["step"].as_u64().unwrap());
            steps.collect::<Vec<u64>>()
        };
        assert_eq!(steps(""), [0u64; 0]);
        assert_eq!(steps("{\"step\":1}\n{\"step\":2}\n{\"st"), [1, 2]);
        assert_eq!(steps("{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n"), [1, 2, 3]);
        assert_eq!(steps("{\"step\":1}\n{\"step\":5}\n{\"step\":6}\n{\"step\":7}\n"), [1, 5, 6, 7]);
    }
}
