//! Somebody wants the run to have another number of workers.
//!
//! ```text
//! who asks ──Scale──> coordinator ──event──> launcher: starts who lacks, remembers
//!     <──Scaling──        │  <──command──────────┘
//!                         └── sends away who is too many
//! ```
//!
//! The coordinator sends workers away that are too many, wherever they are. It cannot start any: its launcher does, and tells the
//! next coordinator what was asked for, should this one die. Only when the launcher knows is the answer given.

use tokio::sync::oneshot;

use super::core::Core;
use crate::event::Event;
use crate::membership;
use crate::protocol::FromCoordinator;

/// Questions that may wait for the launcher.
const ASKED_MAX: usize = 16;

/// A question that waits for the launcher.
#[derive(Debug)]
pub(super) struct Asked {
    wanted: u32,
    there: u32,
    answer: oneshot::Sender<FromCoordinator>,
}

impl Core {
    /// What a wish for so many workers means for membership.
    pub(super) async fn scale(
        &mut self,
        wanted: u32,
        answer: oneshot::Sender<FromCoordinator>,
    ) -> Vec<membership::Event> {
        let there = match self.registry.may_scale(wanted).and_then(|there| self.can_scale(there, wanted)) {
            Ok(there) => there,
            Err(reason) => {
                // Who does not wait for the answer does not want it.
                let _ = answer.send(FromCoordinator::Refused { reason });
                return Vec::new();
            }
        };
        self.emit(Event::ScaleRequested { wanted, there }).await;
        self.asked.push(Asked { wanted, there, answer });
        if self.config.launcher { Vec::new() } else { self.shrink(wanted) }
    }

    /// Whether there is somebody who does it.
    fn can_scale(&self, there: u32, wanted: u32) -> Result<u32, String> {
        if self.asked.len() >= ASKED_MAX {
            return Err("too many others ask for it: try again".to_owned());
        }
        match wanted > there && !self.config.launcher {
            true => Err(format!(
                "this coordinator has no launcher that could start workers: start {} with `mattock worker --token-file`",
                wanted - there
            )),
            false => Ok(there),
        }
    }

    /// So many workers are enough, and whoever starts others knows it.
    pub(super) fn shrink(&mut self, wanted: u32) -> Vec<membership::Event> {
        for asked in self.asked.extract_if(.., |asked| asked.wanted == wanted) {
            let _ = asked.answer.send(FromCoordinator::Scaling { there: asked.there });
        }
        vec![membership::Event::Shrink(wanted)]
    }
}
