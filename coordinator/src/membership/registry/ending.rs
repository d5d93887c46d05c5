//! How a run ends: completed or stopped with what its members say alike, or failed with a reason. It ends once.

use super::{Action, Finish, Outcome, Phase, Registry};

impl Registry {
    pub(super) fn all_finished(&self) -> bool {
        self.members().all(|worker| worker.finish.is_some())
    }

    pub(super) fn finish(&mut self, actions: &mut Vec<Action>) {
        let finishes: Vec<&Finish> = self.members().filter_map(|worker| worker.finish.as_ref()).collect();
        let Some(mut finish) = finishes.first().map(|&first| first.clone()) else { return };
        if let Some(other) = finishes.iter().find(|other| other.state_hash != finish.state_hash) {
            let (a, b) = (finish.state_hash, other.state_hash);
            let reason = format!("workers ended with different states: {a:016x} and {b:016x}");
            return self.end(Outcome::Failed, &reason, actions);
        }
        finish.held_out_loss = finishes.iter().find_map(|finish| finish.held_out_loss);
        match finish.completed {
            true => self.end(Outcome::Completed(finish), "all steps are done", actions),
            false => self.end(Outcome::Stopped(finish), "stopped on request", actions),
        }
    }

    pub(super) fn end(&mut self, outcome: Outcome, reason: &str, actions: &mut Vec<Action>) {
        if self.phase == Phase::Ended {
            return;
        }
        self.phase = Phase::Ended;
        actions.push(Action::End(outcome, reason.to_owned()));
    }

    /// The run has no worker left, and nobody else comes.
    pub(super) fn end_of_the_last(&mut self, actions: &mut Vec<Action>) {
        match self.last_lost.take() {
            Some((id, cause)) => {
                let reason = format!("{id} was lost, and no worker is left: {cause}");
                self.end(Outcome::WorkerLost(id), &reason, actions);
            }
            None => self.end(Outcome::Failed, "all workers have left", actions),
        }
    }
}
