//! Seeded random streams: one a purpose, the same on every machine and at any thread count.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// A seeded generator of random numbers; ChaCha with 8 rounds, whose output is fixed by its specification.
pub type RandomStream = ChaCha8Rng;

/// The stream named `name` of a run's `seed`: streams of different names are independent, so that drawing more from one
/// (say, dropout) never changes another (say, the order of the data).
///
/// # Examples
/// ```
/// use pivotal_core::random_stream;
/// use rand::Rng;
/// let (mut a, mut b) = (random_stream(1, "shuffle"), random_stream(1, "shuffle"));
/// assert_eq!(a.next_u64(), b.next_u64());
/// assert_ne!(random_stream(1, "shuffle").next_u64(), random_stream(1, "init").next_u64());
/// ```
pub fn random_stream(seed: u64, name: &str) -> RandomStream {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}
