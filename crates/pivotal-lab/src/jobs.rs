//! Independent jobs on a few worker threads.
//!
//! Each worker computes in a thread pool of its own with one thread, so that how many workers there are changes when a
//! job is done and never what comes out of it.

use std::collections::VecDeque;
use std::sync::{Mutex, mpsc};

use rayon::ThreadPoolBuilder;

use crate::error::Result;

/// A job: its value, and what to say of it.
pub(crate) struct Job<'a, T> {
    name: String,
    work: Box<dyn FnOnce() -> Result<(T, String)> + Send + 'a>,
}

impl<'a, T> Job<'a, T> {
    pub(crate) fn new(
        name: impl Into<String>,
        work: impl FnOnce() -> Result<(T, String)> + Send + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            work: Box::new(work),
        }
    }
}

/// The jobs' values, in the order of the jobs; `progress` gets a line as each is done.
///
/// # Errors
/// The error of the first job, in their order, that failed; jobs not begun by then are left out.
pub(crate) fn run<T: Send>(
    threads: usize,
    jobs: Vec<Job<'_, T>>,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<T>> {
    let total = jobs.len();
    let pools = (0..threads.clamp(1, total.max(1)))
        .map(|_| ThreadPoolBuilder::new().num_threads(1).build())
        .collect::<Result<Vec<_>, _>>()?;
    let queue = Mutex::new(jobs.into_iter().enumerate().collect::<VecDeque<_>>());
    let (sender, receiver) = mpsc::channel();
    let mut results: Vec<Option<Result<T>>> = (0..total).map(|_| None).collect();
    std::thread::scope(|scope| {
        for pool in &pools {
            let (sender, queue) = (sender.clone(), &queue);
            scope.spawn(move || {
                while let Some((index, job)) = take(queue) {
                    let result = pool.install(job.work);
                    if result.is_err() {
                        queue.lock().expect("no worker panics here").clear();
                    }
                    if sender.send((index, job.name, result)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (done, (index, name, result)) in receiver.iter().enumerate() {
            results[index] = Some(result.map(|(value, line)| {
                progress(&format!("[{}/{total}] {name}: {line}", done + 1));
                value
            }));
        }
    });
    results.into_iter().flatten().collect()
}

fn take<'a, T>(queue: &Mutex<VecDeque<(usize, Job<'a, T>)>>) -> Option<(usize, Job<'a, T>)> {
    queue.lock().expect("no worker panics here").pop_front()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn square(value: u64) -> Job<'static, u64> {
        Job::new(format!("job {value}"), move || {
            Ok((value * value, format!("{}", rayon::current_num_threads())))
        })
    }

    #[test]
    fn values_keep_the_order_of_the_jobs_and_each_runs_on_one_thread() {
        for threads in [1, 3] {
            let mut lines = Vec::new();
            let values = run(threads, (0..7).map(square).collect(), &mut |line| {
                lines.push(line.to_owned());
            });
            assert_eq!(values.unwrap(), [0, 1, 4, 9, 16, 25, 36]);
            assert_eq!(lines.len(), 7);
            assert!(lines.iter().all(|line| line.ends_with(": 1")), "{lines:?}");
        }
    }

    #[test]
    fn a_failed_job_fails_the_run_and_leaves_out_the_rest() {
        let failing = Job::new("bad", || {
            Err(Error::Setting {
                name: "seeds",
                found: "none".into(),
                expected: "at least one",
            })
        });
        let jobs = vec![square(1), failing, square(2)];
        let mut done = 0;
        let result = run(1, jobs, &mut |_| done += 1);
        assert!(matches!(result, Err(Error::Setting { name: "seeds", .. })));
        assert_eq!(done, 1);
    }
}
