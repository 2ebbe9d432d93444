//! Threads that stay awake between short parallel pieces.
//!
//! A step of decoding is some three hundred pieces of 10 to 100 microseconds. A thread of rayon's that finds nothing to do goes to
//! sleep within that time, and waking it takes about as long again. The threads of a team wait for the next piece instead.
//!
//! Nobody waits for a thread that has not come: a piece's blocks are taken by whoever is there, and the leader takes all of
//! them if nobody is. So teams may overlap, and a thread that is busy elsewhere holds nothing up.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Tries, of a few nanoseconds each, before a waiting thread offers its processor to others.
const PATIENCE: u32 = 1 << 14;
/// Teams whose call some thread has not answered yet, above which a body runs without one: threads are busy elsewhere, and each
/// call waits in their queues.
const MOST_CALLED: usize = 64;

/// The piece at hand: called with the index of a block, and with the share that it is the last one of, if it is.
type Body<'a> = &'a (dyn Fn(usize, Option<LastOf>) + Sync);

/// A thread's share of a piece: with the same team it is where the thread's share of the next piece lies among that one's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastOf {
    index: usize,
    shares: usize,
}

impl LastOf {
    /// Of one thread that has all of it.
    pub(crate) const WHOLE: Self = Self {
        index: 0,
        shares: 1,
    };

    /// The first block of this share, of a piece of so many.
    pub(crate) fn first(self, blocks: usize) -> usize {
        self.index * blocks / self.shares
    }
}

/// The blocks of a piece that are one thread's to begin with, taken in order; others may take them once theirs are done.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

/// A number on a line of its own: several threads write it all the time.
#[derive(Default)]
#[repr(align(128))]
struct Alone<T>(T);

struct Team {
    /// One a thread of the pool.
    shares: Vec<Share>,
    /// Whether blocks of `body` may be taken.
    open: Alone<AtomicBool>,
    /// Helpers that may be using `body`.
    busy: Alone<AtomicUsize>,
    body: UnsafeCell<Option<Body<'static>>>,
    dismissed: AtomicBool,
    /// What a block panicked with on a helper.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Teams that still have a call in some thread's queue.
static CALLED: AtomicUsize = AtomicUsize::new(0);

impl Drop for Team {
    fn drop(&mut self) {
        CALLED.fetch_sub(1, Ordering::Relaxed);
    }
}

// SAFETY: `body` is the only field that is not `Sync`. The leader writes it while the team is not open and no helper is busy;
// helpers read it after they said that they are busy and then found the team open (see `take`).
unsafe impl Sync for Team {}

/// What a thread is to a team.
#[derive(Clone, Copy, Default)]
enum Role {
    #[default]
    Nothing,
    /// It leads this one, which waits.
    Leader(&'static Team),
    /// It works on a block, of its own team or of another's.
    Worker,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Nothing) };
}

/// Runs `body` on a thread of rayon's current pool with the others at hand: the kernels it calls are cut into the same blocks as ever,
/// with the same results, and handing a block to another thread costs a fraction of a microsecond.
///
/// For bodies of many short kernels: until the body ends the other threads do nothing else. What `body` itself gives to rayon waits
/// that long for anyone but this thread.
///
/// # Panics
/// If `body` does, or a block of a kernel on another thread.
///
/// # Examples
/// ```
/// let mut sum = [1.0; 4];
/// pivotal_kernels::with_team(|| pivotal_kernels::add_into(&mut sum, &[1.0; 4]));
/// assert_eq!(sum, [2.0; 4]);
/// ```
pub fn with_team<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    // On the pool, whose threads are called.
    rayon::scope(|_| {
        let threads = rayon::current_num_threads();
        let is_free = matches!(ROLE.get(), Role::Nothing);
        if threads == 1 || !is_free || CALLED.load(Ordering::Relaxed) >= MOST_CALLED {
            return body();
        }
        CALLED.fetch_add(1, Ordering::Relaxed);
        let team = Arc::new(Team {
            shares: std::iter::repeat_with(Share::default)
                .take(threads)
                .collect(),
            open: Alone::default(),
            busy: Alone::default(),
            body: UnsafeCell::new(None),
            dismissed: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let called = Arc::clone(&team);
        rayon::spawn_broadcast(move |context| {
            // Not where a thread comes to this call while it waits inside a body or a block: the leader's own, which would wait for
            // itself to end, or another team's.
            if matches!(ROLE.get(), Role::Nothing) {
                called.help(context.index());
            }
        });
        let dismissal = Dismissal(&team);
        // SAFETY: `dismissal` takes the reference away again before the team is gone, whether `body` returns or panics.
        ROLE.set(Role::Leader(unsafe {
            std::mem::transmute::<&Team, &'static Team>(&team)
        }));
        let result = body();
        drop(dismissal);
        result
    })
}

/// Sends the helpers home.
struct Dismissal<'a>(&'a Team);

impl Drop for Dismissal<'_> {
    fn drop(&mut self) {
        ROLE.set(Role::Nothing);
        self.0.dismissed.store(true, Ordering::Release);
    }
}

/// How a piece of so much work is done where this thread is: see [`for_each_block`](crate::parallel::for_each_block).
pub(crate) enum Hands {
    /// By rayon's pool.
    Pool,
    /// By the team that this thread leads.
    Team(Led),
    /// By this thread alone, which works on a block already. To wait for others in the middle of one could be to wait for oneself.
    Own,
}

/// The team that this thread leads.
pub(crate) struct Led(&'static Team);

/// Who is at hand.
pub(crate) fn hands() -> Hands {
    match ROLE.get() {
        Role::Nothing => Hands::Pool,
        Role::Leader(team) => Hands::Team(Led(team)),
        Role::Worker => Hands::Own,
    }
}

impl Led {
    /// Runs `body` for every index below `blocks`.
    pub(crate) fn run(self, blocks: usize, body: impl Fn(usize, Option<LastOf>) + Sync) {
        self.0.run(blocks, &body);
    }
}

/// Marks this thread as working on blocks, until it is dropped.
struct AtWork(Role);

impl AtWork {
    fn begin() -> Self {
        Self(ROLE.replace(Role::Worker))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        ROLE.set(self.0);
    }
}

impl Team {
    fn run(&self, blocks: usize, body: Body<'_>) {
        let shares = self.shares.len();
        let first = |index| LastOf { index, shares }.first(blocks);
        for (index, share) in self.shares.iter().enumerate() {
            share.next.store(first(index), Ordering::Relaxed);
            share.end.store(first(index + 1), Ordering::Relaxed);
        }
        // SAFETY: not open and nobody busy, or the last `run` would not have returned: no helper reads it now. `piece` sees to
        // it that none does once `body` is gone.
        unsafe { *self.body.get() = Some(std::mem::transmute::<Body<'_>, Body<'static>>(body)) };
        self.open.0.store(true, Ordering::SeqCst);
        let piece = Piece(self);
        self.work(rayon::current_thread_index().unwrap_or(0), body);
        drop(piece);
        let panic = self
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Takes blocks until none is left: first those of `own` share.
    fn work(&self, own: usize, body: Body<'_>) {
        let _working = AtWork::begin();
        let threads = self.shares.len();
        for at in (own..threads).chain(0..own) {
            let share = &self.shares[at];
            let end = share.end.load(Ordering::Relaxed);
            while share.next.load(Ordering::Relaxed) < end {
                let block = share.next.fetch_add(1, Ordering::Relaxed);
                if block < end {
                    let last = (at == own && block + 1 == end).then_some(LastOf {
                        index: own,
                        shares: threads,
                    });
                    body(block, last);
                }
            }
        }
    }

    fn help(&self, index: usize) {
        let mut patience = Patience::default();
        while !self.dismissed.load(Ordering::Acquire) {
            if self.open.0.load(Ordering::Relaxed) {
                self.take(index);
                patience = Patience::default();
            }
            patience.wait();
        }
    }

    fn take(&self, index: usize) {
        // The leader closes and then waits until nobody is busy; a helper is busy first and then looks whether it is open. In the
        // one order that all of these have, either the helper finds it closed or the leader finds the helper.
        self.busy.0.fetch_add(1, Ordering::SeqCst);
        if self.open.0.load(Ordering::SeqCst) {
            // SAFETY: the leader wrote it before it opened, and will not touch it before this helper is no longer busy.
            let body = unsafe { *self.body.get() };
            let body = body.expect("an open team has a piece at hand");
            // The leader goes on with it: a helper has nobody to tell.
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.work(index, body))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
        }
        self.busy.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How long a thread has waited.
#[derive(Default)]
struct Patience(u32);

impl Patience {
    fn wait(&mut self) {
        std::hint::spin_loop();
        self.0 = self.0.saturating_add(1);
        if self.0 > PATIENCE {
            std::thread::yield_now();
        }
    }
}

/// A piece that is being worked on; ends it, also where a block panics.
struct Piece<'a>(&'a Team);

impl Drop for Piece<'_> {
    fn drop(&mut self) {
        self.0.open.0.store(false, Ordering::SeqCst);
        let mut patience = Patience::default();
        while self.0.busy.0.load(Ordering::SeqCst) > 0 {
            patience.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::for_each_block;
    use crate::testing::on_threads;

    /// Enough of a piece to be handed around.
    const WORK: usize = usize::MAX;

    #[test]
    fn every_block_of_every_piece_runs_once() {
        // More threads than any machine here has processors, too: some then come late or never.
        for threads in [1, 2, 3, 8, 33] {
            on_threads(threads, || {
                with_team(|| {
                    for blocks in (0..40).cycle().take(2000) {
                        let counts: Vec<AtomicUsize> =
                            (0..blocks).map(|_| AtomicUsize::new(0)).collect();
                        for_each_block(blocks, 1, WORK, |block| {
                            assert_eq!(block.len(), 1);
                            counts[block.start].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                    }
                });
            });
        }
    }

    #[test]
    fn others_help_where_there_are_any() {
        on_threads(2, || {
            with_team(|| {
                let (met, seen) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
                // Each of the two waits until the other has come: one thread alone would never end.
                for_each_block(2, 1, WORK, |_| {
                    met.fetch_add(1, Ordering::SeqCst);
                    while met.load(Ordering::SeqCst) < 2 {
                        std::thread::yield_now();
                    }
                    seen.lock().unwrap().push(std::thread::current().id());
                });
                let seen = seen.into_inner().unwrap();
                assert_ne!(seen[0], seen[1]);
            });
        });
    }

    #[test]
    fn teams_overlap_and_nest() {
        let total = AtomicUsize::new(0);
        on_threads(3, || {
            rayon::scope(|scope| {
                for _ in 0..6 {
                    scope.spawn(|_| {
                        with_team(|| {
                            for _ in 0..200 {
                                for_each_block(5, 1, WORK, |_| {
                                    with_team(|| {
                                        for_each_block(3, 1, WORK, |_| {
                                            total.fetch_add(1, Ordering::Relaxed);
                                        });
                                    });
                                });
                            }
                        });
                    });
                }
            });
        });
        assert_eq!(total.into_inner(), 6 * 200 * 5 * 3);
    }

    #[test]
    fn a_thread_that_does_not_come_is_not_waited_for() {
        on_threads(2, || {
            let (stop, stopped) = std::sync::mpsc::channel();
            rayon::scope(|scope| {
                // One thread is kept from coming until the other has ended its teams, more than there may be calls.
                scope.spawn(move |_| stopped.recv().unwrap());
                for _ in 0..2 * MOST_CALLED {
                    let sum = AtomicUsize::new(0);
                    with_team(|| {
                        for_each_block(9, 1, WORK, |block| {
                            sum.fetch_add(block.start, Ordering::Relaxed);
                        });
                    });
                    assert_eq!(sum.into_inner(), 36);
                }
                stop.send(()).unwrap();
            });
        });
    }

    #[test]
    fn a_body_may_use_rayon() {
        use rayon::prelude::*;
        for threads in [2, 5] {
            on_threads(threads, || {
                for _ in 0..50 {
                    let sum: usize = with_team(|| (0..1000usize).into_par_iter().sum());
                    assert_eq!(sum, 499_500);
                }
            });
        }
    }

    #[test]
    fn a_panic_anywhere_ends_it() {
        for panicking in 0..8 {
            let caught = std::panic::catch_unwind(|| {
                on_threads(2, || {
                    with_team(|| {
                        for_each_block(8, 1, WORK, |block| assert_ne!(block.start, panicking))
                    });
                });
            });
            assert!(caught.is_err());
        }
        on_threads(2, || {
            assert!(matches!(hands(), Hands::Pool));
            with_team(|| {
                assert!(matches!(hands(), Hands::Team(_)));
                for_each_block(2, 1, WORK, |_| assert!(matches!(hands(), Hands::Own)));
                assert!(matches!(hands(), Hands::Team(_)));
            });
        });
    }
}
