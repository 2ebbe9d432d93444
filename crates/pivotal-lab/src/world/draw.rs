//! Draws from a random stream in integers alone.
//!
//! Written here rather than taken from `rand`: its samplers may change their stream from one release to the next, and
//! the embedded policy is a function of these draws.

use pivotal_core::RandomStream;
use rand::Rng;

/// A number below `bound`, each equally likely (rejection of the incomplete last block).
pub(crate) fn below(stream: &mut RandomStream, bound: u32) -> u32 {
    debug_assert!(bound > 0, "nothing lies below 0");
    let whole = u32::MAX - u32::MAX % bound;
    loop {
        let drawn = stream.next_u32();
        if drawn < whole {
            return drawn % bound;
        }
    }
}

/// A number in `least..=most`.
pub(crate) fn between(stream: &mut RandomStream, least: u32, most: u32) -> u32 {
    least + below(stream, most - least + 1)
}

/// True `permille` times in a thousand.
pub(crate) fn chance(stream: &mut RandomStream, permille: u32) -> bool {
    below(stream, 1000) < permille
}

#[cfg(test)]
mod tests {
    use super::*;
    use pivotal_core::random_stream;

    #[test]
    fn every_value_below_the_bound_is_equally_likely() {
        let mut stream = random_stream(1, "draw test");
        let mut counts = [0_u32; 7];
        for _ in 0..70_000 {
            counts[below(&mut stream, 7) as usize] += 1;
        }
        // Standard deviation of a count: sqrt(70000 · 6/49) = 93.
        assert!(
            counts.iter().all(|count| count.abs_diff(10_000) < 500),
            "{counts:?}"
        );
    }

    #[test]
    fn chances_of_none_and_all_are_certain() {
        let mut stream = random_stream(2, "draw test");
        assert!((0..1000).all(|_| !chance(&mut stream, 0) && chance(&mut stream, 1000)));
        assert!((0..1000).all(|_| between(&mut stream, 3, 3) == 3));
    }
}
