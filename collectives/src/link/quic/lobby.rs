//! Where connections wait until their ring is asked for.
//!
//! Ranks join a generation at different moments, so a neighbour may call before this node has heard of the new ring:
//! its call is kept; so is one for another ring of this generation, which this node has not asked for yet. Calls for
//! generations that are over, and callers with the wrong name for a ring that is being joined, are refused at once.
//!
//! A caller is known by the name in its certificate; the rank it claims is checked when its call is taken. So nobody
//! can take another's place, and each holds one place per ring and generation.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::Notify;

use super::hello::{Hello, Part};
use super::stream::refuse;
use crate::Generation;

/// How many calls wait at most; beyond that the oldest generation gives way.
const CALLS_MAX: usize = 64;

/// A connection whose caller has proved its name and said hello.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) hello: Hello,
    pub(crate) connection: Connection,
    pub(crate) answer: SendStream,
    pub(crate) data: RecvStream,
}

/// The calls that wait.
#[derive(Debug, Default)]
pub(crate) struct Lobby {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<(Generation, Part, String), Call>,
    /// The newest generation that was asked for.
    asked: Option<Generation>,
    /// Its rings that were asked for, and whose call each wants, until that is taken.
    expected: BTreeMap<Part, Option<String>>,
}

impl State {
    fn refusal(&self, generation: Generation, part: Part, name: &str) -> Option<String> {
        let asked = self.asked?;
        if generation < asked {
            return Some(format!("generation {generation} is over, this node is in {asked}"));
        }
        if generation > asked {
            return None;
        }
        match self.expected.get(&part)? {
            Some(expected) if expected == name => None,
            Some(expected) => Some(format!(
                "in {part} of generation {generation} the rank before this one is {expected}, not {name}"
            )),
            None if part == Part::Messages => {
                Some(format!("no messages of generation {generation} are taken any more"))
            }
            None => Some(format!("{part} of generation {generation} is linked already")),
        }
    }

    /// Refuses those who wait in vain.
    fn turn_away(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        for (key, call) in waiting {
            match self.refusal(key.0, key.1, &key.2) {
                Some(reason) => refuse(&call.connection, &reason),
                None => {
                    self.waiting.insert(key, call);
                }
            }
        }
    }
}

impl Lobby {
    /// Takes in a call, or refuses it.
    pub(crate) fn arrive(&self, call: Call) {
        let mut state = self.lock();
        let key = (call.hello.generation, call.hello.part, call.name.clone());
        if let Some(reason) = state.refusal(key.0, key.1, &key.2) {
            tracing::warn!(caller = call.name, reason, "a call is refused");
            return refuse(&call.connection, &reason);
        }
        if let Some(replaced) = state.waiting.insert(key, call) {
            refuse(&replaced.connection, "a newer call of the same name took its place");
        }
        if state.waiting.len() > CALLS_MAX
            && let Some((_, oldest)) = state.waiting.pop_first()
        {
            refuse(&oldest.connection, "too many calls wait here");
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// From now on `generation` is the one, and `caller` whom this ring of it waits for. The ring of all ranks comes first.
    ///
    /// # Errors
    /// With the newest generation asked for, if that is newer.
    pub(crate) fn ask(
        &self,
        generation: Generation,
        part: Part,
        caller: Option<&str>,
    ) -> Result<(), Generation> {
        let mut state = self.lock();
        if let Some(asked) = state.asked.filter(|asked| *asked > generation) {
            return Err(asked);
        }
        if state.asked != Some(generation) || part == Part::Whole {
            state.expected.clear();
        }
        state.asked = Some(generation);
        state.expected.insert(part, caller.map(str::to_owned));
        state.turn_away();
        drop(state);
        self.changed.notify_waiters();
        Ok(())
    }

    /// Waits for the call that [`ask`](Self::ask) expects.
    ///
    /// # Errors
    /// With the newest generation asked for, once that is newer.
    pub(crate) async fn take(
        &self,
        generation: Generation,
        part: Part,
        caller: &str,
    ) -> Result<Call, Generation> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before looking, so that no change is missed.
            changed.as_mut().enable();
            {
                let mut state = self.lock();
                if let Some(asked) = state.asked.filter(|asked| *asked > generation) {
                    return Err(asked);
                }
                if let Some(call) = state.waiting.remove(&(generation, part, caller.to_owned())) {
                    state.expected.insert(part, None);
                    return Ok(call);
                }
            }
            changed.await;
        }
    }

    /// Waits for a call of anybody, in a part that nobody [`ask`](Self::ask)s for.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub(crate) async fn take_any(&self, generation: Generation, part: Part) -> Result<Call, Generation> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before looking, so that no change is missed.
            changed.as_mut().enable();
            {
                let mut state = self.lock();
                if let Some(asked) = state.asked.filter(|asked| *asked > generation) {
                    return Err(asked);
                }
                let of_part = |key: &&(Generation, Part, String)| (key.0, key.1) == (generation, part);
                let first = state.waiting.keys().find(of_part).cloned();
                if let Some(call) = first.and_then(|key| state.waiting.remove(&key)) {
                    return Ok(call);
                }
            }
            changed.await;
        }
    }

    /// From now on, nobody is let into this part of a generation.
    pub(crate) fn shut(&self, generation: Generation, part: Part) {
        let mut state = self.lock();
        if state.asked != Some(generation) {
            return;
        }
        state.expected.insert(part, None);
        state.turn_away();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
