//! Layouts, element by element.

use super::*;
use crate::testing::random;

fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
}

fn packs<const W: usize>(lines: usize, k: usize, along: bool) {
    let values = random(lines * k, 9);
    let (line_stride, k_stride) = if along { (k, 1) } else { (1, lines) };
    let source = Source {
        values: &values,
        line_stride,
        k_stride,
        lines,
        k,
    };
    let mut words = vec![f32::NAN; packed_words::<W>(lines, k)];
    pack::<W>(source, &mut words);
    let pairs = padded_pairs(k);
    let value = |line: usize, at: usize| {
        if line < lines && at < k {
            bf16(values[line * line_stride + at * k_stride])
        } else {
            0
        }
    };
    for (index, word) in words.iter().enumerate() {
        let (panel, rest) = (index / (W * pairs), index % (W * pairs));
        let (pair, line) = if W == TILE_ROWS {
            let (tile, rest) = (rest / 256, rest % 256);
            (16 * tile + rest % 16, panel * W + rest / 16)
        } else {
            (rest / W, panel * W + rest % W)
        };
        let expected = value(line, 2 * pair) | value(line, 2 * pair + 1) << 16;
        assert_eq!(
            word.to_bits(),
            expected,
            "line {line} pair {pair} of {lines}x{k}"
        );
    }
}

#[test]
fn panels_hold_rounded_pairs_and_zeros_beyond_the_edge() {
    if !available() {
        return;
    }
    for lines in [1, 8, 15, 16, 17, 47, 48, 49, 100] {
        for k in [1, 2, 31, 32, 33, 64, 71] {
            for along in [true, false] {
                packs::<ROWS>(lines, k, along);
                packs::<TILE_ROWS>(lines, k, along);
                packs::<COLUMNS>(lines, k, along);
            }
        }
    }
}

#[test]
fn blocks_of_rows_are_packed_as_all_of_them() {
    if !available() {
        return;
    }
    let columns = 50;
    for ends in [
        vec![0, 15],
        vec![0, 16, 37],
        vec![0, 2, 48, 64],
        vec![0, 48, 80, 81],
    ] {
        let rows = ends[ends.len() - 1];
        let values = random(rows * columns, 9);
        let source = Source {
            values: &values,
            line_stride: 1,
            k_stride: columns,
            lines: columns,
            k: rows,
        };
        let mut expected = vec![f32::NAN; packed_words::<COLUMNS>(columns, rows)];
        pack::<COLUMNS>(source, &mut expected);
        let mut words = vec![f32::NAN; expected.len()];
        let target = SharedOut::new(&mut words);
        // The last one first: what follows a block's rows must not be written by it.
        for block in ends.windows(2).rev() {
            let (first, end) = (block[0], block[1]);
            let block = BlockRows {
                values: &values[first * columns..],
                stride: columns,
                rows: end - first,
                columns,
            };
            // SAFETY: `words` is as long, and nobody else is here.
            unsafe { block.pack_right(target, rows, first, 0) };
        }
        let bits = |words: &[f32]| words.iter().map(|word| word.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&words), bits(&expected), "{ends:?}");
    }
}

#[test]
fn unpacking_gives_back_what_was_rounded() {
    if !available() {
        return;
    }
    for lines in [0, 1, 47, 48, 49, 100] {
        for k in [1, 2, 31, 33, 71] {
            let values = random(lines * k, 9);
            let source = Source {
                values: &values,
                line_stride: k,
                k_stride: 1,
                lines,
                k,
            };
            let mut words = vec![f32::NAN; packed_words::<COLUMNS>(lines, k)];
            pack::<COLUMNS>(source, &mut words);
            let mut unpacked = vec![f32::NAN; lines * k];
            unpack_columns(&words, k, &mut unpacked);
            let rounded = values.iter().map(|&x| f32::from_bits(bf16(x) << 16));
            assert_eq!(unpacked, rounded.collect::<Vec<_>>(), "{lines} x {k}");
        }
    }
}

#[test]
fn packing_nothing_is_nothing() {
    if available() {
        for (lines, k) in [(0, 5), (5, 0), (0, 0)] {
            packs::<ROWS>(lines, k, true);
            packs::<TILE_ROWS>(lines, k, false);
            packs::<COLUMNS>(lines, k, false);
        }
    }
}
