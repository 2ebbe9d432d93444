//! The 26 tokens: one character each.

use super::WorldError;

/// The characters in the order of their ids.
pub const CHARACTERS: &str = "^0123456789+-=;$HGFEDCBA?#";

/// Tokens in the vocabulary.
pub const SIZE: usize = CHARACTERS.len();

/// `^`: begins every prompt.
pub const BEGIN: u32 = 0;
/// `0`: the digit d has the id `ZERO + d`.
pub const ZERO: u32 = 1;
/// `+`.
pub const PLUS: u32 = 11;
/// `-`.
pub const MINUS: u32 = 12;
/// `=`: a result follows; also ends the operations of a prompt.
pub const EQUALS: u32 = 13;
/// `;`: ends a step.
pub const STEP_END: u32 = 14;
/// `$`: ends every response (EOS).
pub const END: u32 = 15;
/// `A`: the letter of the last operation; the one before it has the id one less.
pub const LETTER_A: u32 = 23;
/// `?`: the two digits that follow are a claimed result.
pub const CLAIM: u32 = 24;
/// `#`: the prompt asks for sorted digits.
pub const SORT: u32 = 25;

/// The most steps a problem can have: one for each letter, `H` to `A`.
pub const MOST_STEPS: usize = 8;

/// The token of a digit 0 to 9.
pub(crate) fn digit(value: u8) -> u32 {
    debug_assert!(value < 10, "{value} is no digit");
    ZERO + u32::from(value)
}

/// The digit that a token stands for.
pub fn digit_value(token: u32) -> Option<u8> {
    (ZERO..ZERO + 10)
        .contains(&token)
        .then(|| (token - ZERO) as u8)
}

/// A number's two tokens, units first.
pub(crate) fn number(value: u8) -> [u32; 2] {
    [digit(value % 10), digit(value / 10)]
}

/// The letter of step `step` of `steps`: the last is `A`.
pub(crate) fn letter(step: usize, steps: usize) -> u32 {
    LETTER_A - (steps - 1 - step) as u32
}

/// The token ids of a text.
///
/// # Errors
/// [`WorldError::Character`] at the first character that is no token.
///
/// # Examples
/// ```
/// assert_eq!(pivotal_lab::world::vocabulary::encode("^A-60")?, [0, 23, 12, 7, 1]);
/// # Ok::<(), pivotal_lab::world::WorldError>(())
/// ```
pub fn encode(text: &str) -> Result<Vec<u32>, WorldError> {
    text.chars()
        .enumerate()
        .map(|(position, found)| {
            CHARACTERS
                .find(found)
                .map(|id| id as u32)
                .ok_or(WorldError::Character { found, position })
        })
        .collect()
}

/// The text of token ids.
///
/// # Errors
/// [`WorldError::TokenId`] at the first id above the vocabulary.
pub fn decode(tokens: &[u32]) -> Result<String, WorldError> {
    tokens
        .iter()
        .enumerate()
        .map(|(position, &found)| {
            CHARACTERS
                .as_bytes()
                .get(found as usize)
                .map(|&byte| char::from(byte))
                .ok_or(WorldError::TokenId {
                    found,
                    position,
                    expected: SIZE,
                })
        })
        .collect()
}

/// `(cos, sin)` of 2πkd/10 for k = 1…5, of each digit d: ten numbers a digit, in thousandths of a millionth.
///
/// Put into the first ten columns of a digit's embedding before training, they let a small model add modulo 10 at once
/// where it otherwise sits on a plateau. As integers, because `cos` differs in its last bit between platforms.
pub const DIGIT_WAVES_NANO: [[i32; 10]; 10] = {
    // cos(2πj/10) and sin(2πj/10), j = 0…9.
    const COSINE: [i32; 10] = [
        1_000_000_000,
        809_016_994,
        309_016_994,
        -309_016_994,
        -809_016_994,
        -1_000_000_000,
        -809_016_994,
        -309_016_994,
        309_016_994,
        809_016_994,
    ];
    const SINE: [i32; 10] = [
        0,
        587_785_252,
        951_056_516,
        951_056_516,
        587_785_252,
        0,
        -587_785_252,
        -951_056_516,
        -951_056_516,
        -587_785_252,
    ];
    let mut waves = [[0; 10]; 10];
    let mut digit = 0;
    while digit < 10 {
        let mut wave = 1;
        while wave <= 5 {
            let turn = wave * digit % 10;
            waves[digit][2 * wave - 2] = COSINE[turn];
            waves[digit][2 * wave - 1] = SINE[turn];
            wave += 1;
        }
        digit += 1;
    }
    waves
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_characters_agree() {
        let text = format!("^0+-=;$A?#{}", "H");
        assert_eq!(
            encode(&text),
            Ok(vec![
                BEGIN,
                ZERO,
                PLUS,
                MINUS,
                EQUALS,
                STEP_END,
                END,
                LETTER_A,
                CLAIM,
                SORT,
                letter(0, MOST_STEPS)
            ])
        );
        assert_eq!(decode(&encode(CHARACTERS).unwrap()).unwrap(), CHARACTERS);
        assert_eq!(decode(&number(52)).unwrap(), "25");
        assert_eq!(SIZE, 26);
    }

    #[test]
    fn what_is_no_token_is_named() {
        assert_eq!(
            encode("^é"),
            Err(WorldError::Character {
                found: 'é',
                position: 1
            })
        );
        assert!(decode(&[0, 26]).unwrap_err().to_string().contains("26"));
        assert_eq!(digit_value(EQUALS), None);
        assert_eq!(digit_value(digit(9)), Some(9));
    }

    #[test]
    fn digit_waves_are_the_trigonometric_functions() {
        for (digit, waves) in DIGIT_WAVES_NANO.iter().enumerate() {
            for k in 1..=5 {
                let angle = std::f64::consts::TAU * (k * digit) as f64 / 10.0;
                let (sine, cosine) = angle.sin_cos();
                assert!((f64::from(waves[2 * k - 2]) * 1e-9 - cosine).abs() < 1e-9);
                assert!((f64::from(waves[2 * k - 1]) * 1e-9 - sine).abs() < 1e-9);
            }
        }
    }
}
