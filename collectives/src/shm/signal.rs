//! How a rank that comes further and one that waits for it do not miss each other. The protocol alone, so that every
//! interleaving of it can be tried.
//!
//! ```text
//! who comes further            who waits
//! add a tick                   say: I sleep
//! fence                        fence
//! does anybody sleep?          look at the ticks; enough?
//! wake them                    sleep while the ticks are what was seen
//! ```
//!
//! Each writes, then reads what the other writes, with a sequentially consistent fence between: either the one sees the new
//! tick, or the other sees the sleeper. And the system puts nobody to sleep whose ticks have changed since they were seen.

/// What the protocol is made of.
pub(super) trait Signals {
    /// Names another rank.
    type Peer: Copy;
    /// Adds a tick of this rank's; what was written before is seen by who sees the tick.
    fn add_tick(&self);
    /// Nothing behind it happens before anything that is in front of it.
    fn fence(&self);
    /// Whether another rank says that it sleeps.
    fn anybody_sleeps(&self) -> bool;
    /// Wakes all who sleep until this rank's ticks change.
    fn wake(&self);
    /// Says whether this rank sleeps.
    fn set_sleeping(&self, sleeping: bool);
    /// How far another rank is.
    fn ticks_of(&self, peer: Self::Peer) -> u32;
    /// Sleeps while the other rank's ticks are `seen`; may return at any time.
    fn sleep(&self, peer: Self::Peer, seen: u32);
}

/// Tells everybody that this rank has come further.
pub(super) fn tick(signals: &impl Signals) {
    signals.add_tick();
    signals.fence();
    if signals.anybody_sleeps() {
        signals.wake();
    }
}

/// Sleeps until `judge`, who is given the other rank's ticks and what `look` saw before them, has a verdict.
pub(super) fn sleep_until<S: Signals, L, V>(
    signals: &S,
    peer: S::Peer,
    look: impl Fn() -> L,
    judge: impl Fn(u32, L) -> Option<V>,
) -> V {
    signals.set_sleeping(true);
    signals.fence();
    let verdict = loop {
        let looked = look();
        let seen = signals.ticks_of(peer);
        match judge(seen, looked) {
            Some(verdict) => break verdict,
            None => signals.sleep(peer, seen),
        }
    };
    signals.set_sleeping(false);
    verdict
}

#[cfg(test)]
mod tests {
    use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    use loom::sync::{Arc, Condvar, Mutex};

    use super::*;

    /// What two ranks share, and the system's list of sleepers.
    struct Host {
        ticks: [AtomicU32; 2],
        sleeping: [AtomicBool; 2],
        /// What was done before the tick.
        work: [AtomicU32; 2],
        kernel: Mutex<()>,
        woken: Condvar,
    }

    struct Rank {
        host: Arc<Host>,
        own: usize,
    }

    impl Signals for Rank {
        type Peer = usize;

        fn add_tick(&self) {
            self.host.ticks[self.own].fetch_add(1, Ordering::Release);
        }

        fn fence(&self) {
            fence(Ordering::SeqCst);
        }

        fn anybody_sleeps(&self) -> bool {
            self.host.sleeping[1 - self.own].load(Ordering::Relaxed)
        }

        fn wake(&self) {
            let _kernel = self.host.kernel.lock().unwrap();
            self.host.woken.notify_all();
        }

        fn set_sleeping(&self, sleeping: bool) {
            self.host.sleeping[self.own].store(sleeping, Ordering::Relaxed);
        }

        fn ticks_of(&self, peer: usize) -> u32 {
            self.host.ticks[peer].load(Ordering::Acquire)
        }

        /// As a futex: compares and goes to sleep while nobody can be woken.
        fn sleep(&self, peer: usize, seen: u32) {
            let kernel = self.host.kernel.lock().unwrap();
            if self.host.ticks[peer].load(Ordering::Relaxed) == seen {
                drop(self.host.woken.wait(kernel).unwrap());
            }
        }
    }

    fn wait_for(rank: &Rank, peer: usize, ticks: u32) {
        sleep_until(rank, peer, || (), |seen, ()| (seen >= ticks).then_some(()));
    }

    /// Runs both ranks in every order that the memory model allows; a sleeper that nobody wakes is a deadlock, which
    /// loom reports.
    fn try_all(first: fn(&Rank), second: fn(&Rank)) {
        loom::model(move || {
            let zeros = || [AtomicU32::new(0), AtomicU32::new(0)];
            let sleeping = [AtomicBool::new(false), AtomicBool::new(false)];
            let (kernel, woken) = (Mutex::new(()), Condvar::new());
            let host = Arc::new(Host { ticks: zeros(), sleeping, work: zeros(), kernel, woken });
            let other = Rank { host: Arc::clone(&host), own: 1 };
            let thread = loom::thread::spawn(move || second(&other));
            first(&Rank { host, own: 0 });
            thread.join().unwrap();
        });
    }

    #[test]
    fn a_sleeper_sees_the_tick_and_what_was_done_before_it() {
        try_all(
            |rank| {
                rank.host.work[0].store(7, Ordering::Relaxed);
                tick(rank);
            },
            |rank| {
                wait_for(rank, 0, 1);
                assert_eq!(rank.host.work[0].load(Ordering::Relaxed), 7);
            },
        );
    }

    #[test]
    fn two_that_wait_for_each_other_both_go_on() {
        let meet = |rank: &Rank| {
            tick(rank);
            wait_for(rank, 1 - rank.own, 1);
        };
        try_all(meet, meet);
    }
}
