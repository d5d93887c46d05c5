//! Another number of workers, on request: what the launcher does about it. Pure.
//!
//! The coordinator sends workers away that are too many. The launcher starts those that lack, on this machine, takes back
//! those that it has started but that have not joined, and remembers: should the coordinator die before its ring is small
//! enough, the next one is told.

/// A request, until it is known to be met.
#[derive(Debug, Default)]
pub(super) struct Scale {
    shrink_to: Option<u32>,
}

/// What is to be done on this machine.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Workers to start.
    pub(super) start: u32,
    /// Processes to end that have not joined yet.
    pub(super) take_back: u32,
}

impl Scale {
    /// The run is to have so many workers; so many are there, and so many have been started and did not join yet.
    pub(super) fn request(&mut self, wanted: u32, there: u32, starting: u32) -> Change {
        self.shrink_to = (wanted < there).then_some(wanted);
        let coming = there.saturating_add(starting);
        Change {
            start: wanted.saturating_sub(coming),
            take_back: coming.saturating_sub(wanted).min(starting),
        }
    }

    /// So many workers have done a step.
    pub(super) fn stepped(&mut self, world_size: u32) {
        self.shrink_to.take_if(|wanted| world_size <= *wanted);
    }

    /// What another coordinator must be told.
    pub(super) fn unmet(&self) -> Option<u32> {
        self.shrink_to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_have_not_joined_count_as_coming() {
        for (wanted, there, starting, start, take_back) in
            [(4, 2, 0, 2, 0), (4, 2, 1, 1, 0), (4, 2, 3, 0, 1), (1, 3, 2, 0, 2), (3, 3, 0, 0, 0)]
        {
            let change = Scale::default().request(wanted, there, starting);
            assert_eq!(change, Change { start, take_back }, "{wanted} of {there} and {starting}");
        }
    }

    #[test]
    fn a_request_for_fewer_is_kept_until_a_step_of_as_few() {
        let mut scale = Scale::default();
        scale.request(2, 4, 0);
        scale.stepped(4);
        scale.stepped(3);
        assert_eq!(scale.unmet(), Some(2));
        scale.stepped(2);
        assert_eq!(scale.unmet(), None);
        scale.request(2, 4, 0);
        scale.request(5, 4, 0);
        assert_eq!(scale.unmet(), None, "the newest counts");
    }
}
