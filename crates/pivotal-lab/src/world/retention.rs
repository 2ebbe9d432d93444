//! The second skill of the starting policy: sorting digits. It is in the corpus and never in the pairs, so that a change of
//! it is a side effect.
//!
//! ```text
//! prompt ^#52047=   response 02457$
//! ```

use pivotal_core::{RandomStream, TokenizedResponse};

use super::draw::{below, between};
use super::problem::Partition;
use super::vocabulary::{BEGIN, END, EQUALS, SORT, digit};

/// The fewest digits to sort.
pub const LEAST_DIGITS: usize = 4;
/// The most digits to sort.
pub const MOST_DIGITS: usize = 6;

/// A prompt of 4 to 6 different digits in `partition`, with its right response; `id` is the caller's.
pub fn draw(stream: &mut RandomStream, partition: Partition, id: u64) -> TokenizedResponse {
    loop {
        let digits = different_digits(stream);
        if Partition::of(digits.iter().copied()) == partition {
            return sample(&digits, id);
        }
    }
}

/// The sample that asks for `digits` in order.
fn sample(digits: &[u8], id: u64) -> TokenizedResponse {
    let mut prompt = vec![BEGIN, SORT];
    prompt.extend(digits.iter().map(|&value| digit(value)));
    prompt.push(EQUALS);
    let mut sorted = digits.to_vec();
    sorted.sort_unstable();
    let mut response: Vec<u32> = sorted.into_iter().map(digit).collect();
    response.push(END);
    let response_mask = vec![true; response.len()];
    TokenizedResponse {
        id,
        prompt,
        response,
        response_mask,
    }
}

fn different_digits(stream: &mut RandomStream) -> Vec<u8> {
    let count = between(stream, LEAST_DIGITS as u32, MOST_DIGITS as u32) as usize;
    let mut digits: Vec<u8> = (0..10).collect();
    for place in 0..count {
        let other = place + below(stream, (digits.len() - place) as u32) as usize;
        digits.swap(place, other);
    }
    digits.truncate(count);
    digits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::vocabulary::{decode, digit_value};
    use pivotal_core::random_stream;

    #[test]
    fn a_sample_asks_for_digits_and_answers_them_sorted() {
        let sample = sample(&[5, 2, 0, 4, 7], 3);
        assert_eq!(decode(&sample.prompt).unwrap(), "^#52047=");
        assert_eq!(decode(&sample.response).unwrap(), "02457$");
        assert_eq!((sample.id, sample.response_mask.len()), (3, 6));
    }

    #[test]
    fn digits_differ_and_every_length_occurs() {
        let mut stream = random_stream(1, "retention test");
        let mut lengths = [0; 11];
        for id in 0..600 {
            let sample = draw(&mut stream, Partition::Training, id);
            let digits: Vec<u8> = sample
                .response
                .iter()
                .filter_map(|&token| digit_value(token))
                .collect();
            assert!(digits.is_sorted_by(|a, b| a < b), "{digits:?}");
            lengths[digits.len()] += 1;
        }
        assert!(
            lengths[LEAST_DIGITS..=MOST_DIGITS]
                .iter()
                .all(|&count| count > 100),
            "{lengths:?}"
        );
        assert_eq!(lengths.iter().sum::<usize>(), 600);
    }
}
