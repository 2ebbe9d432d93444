//! Which bytes of a text each token of a byte-level vocabulary stands for.

/// The byte that a character of the byte-level alphabet stands for (GPT-2's `bytes_to_unicode`, inverted): printable
/// Latin-1 stands for itself, the other 68 bytes for the characters from U+0100 on.
pub(crate) fn byte_of(character: char) -> Option<u8> {
    match character as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The byte offsets of each piece in the lossy text of all pieces together, half-open.
///
/// Pieces that share a character all get that whole character, so that every offset is a character boundary.
pub(crate) fn piece_offsets(pieces: &[Vec<u8>]) -> Vec<[usize; 2]> {
    let bytes = pieces.concat();
    // For every byte, where the character that it belongs to begins and ends in the lossy text.
    let mut bounds: Vec<[usize; 2]> = Vec::with_capacity(bytes.len());
    let mut end = 0;
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            let width = character.len_utf8();
            bounds.extend(std::iter::repeat_n([end, end + width], width));
            end += width;
        }
        if !chunk.invalid().is_empty() {
            let width = char::REPLACEMENT_CHARACTER.len_utf8();
            bounds.extend(std::iter::repeat_n(
                [end, end + width],
                chunk.invalid().len(),
            ));
            end += width;
        }
    }
    let mut start = 0;
    let mut previous_end = 0;
    let mut offsets = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let covered = &bounds[start..start + piece.len()];
        let offset = match (covered.first(), covered.last()) {
            (Some(first), Some(last)) => [first[0], last[1]],
            _ => [previous_end, previous_end],
        };
        start += piece.len();
        previous_end = offset[1];
        offsets.push(offset);
    }
    offsets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_covers_every_byte_once() {
        let mut met = [0; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of) {
                met[usize::from(byte)] += 1;
            }
        }
        assert_eq!(met, [1; 256]);
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn pieces_of_one_character_share_it_and_bad_bytes_count_as_replacements() {
        let pieces = [
            b"a\xc3".to_vec(),
            b"\xa9".to_vec(),
            b"".to_vec(),
            b"\xff".to_vec(),
            b"b".to_vec(),
        ];
        assert_eq!(
            piece_offsets(&pieces),
            [[0, 3], [1, 3], [3, 3], [3, 6], [6, 7]]
        );
        assert_eq!(String::from_utf8_lossy(&pieces.concat()), "aé\u{fffd}b");
    }
}
