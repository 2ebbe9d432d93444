//! Jobs against f64, and what changes no bit.

use super::*;
use crate::matmul::ProductShape;
use crate::panels::{Source, pack, pack_left};
use crate::testing::{assert_close, naive_product, on_each_vector, on_threads, random};

fn dense(values: &[f32], lines: usize, k: usize) -> Source<'_> {
    Source {
        values,
        line_stride: k,
        k_stride: 1,
        lines,
        k,
    }
}

fn pack_rows(values: &[f32], lines: usize, k: usize) -> Vec<f32> {
    let mut words = vec![f32::NAN; left_words(lines, k)];
    pack_left(dense(values, lines, k), &mut words);
    words
}

fn pack_columns(values: &[f32], lines: usize, k: usize) -> Vec<f32> {
    let mut words = vec![f32::NAN; packed_words::<COLUMNS>(lines, k)];
    pack::<COLUMNS>(dense(values, lines, k), &mut words);
    words
}

fn rounded(values: &[f32]) -> Vec<f32> {
    let round =
        |x: &f32| f32::from_bits((x.to_bits() + 0x7fff + ((x.to_bits() >> 16) & 1)) & 0xffff_0000);
    values.iter().map(round).collect()
}

/// Two jobs over `rows`: the first sums products of lengths `ks`, the second is one of length `ks[0]`.
fn run(rows: usize, columns: [usize; 2], ks: &[usize], store: Store) {
    let lefts: Vec<_> = ks
        .iter()
        .map(|k| rounded(&random(rows * k, 1 + *k as u64)))
        .collect();
    let rights: Vec<_> = ks
        .iter()
        .map(|k| rounded(&random(columns[0] * k, 50 + *k as u64)))
        .collect();
    let second = rounded(&random(columns[1] * ks[0], 99));
    let left_words: Vec<_> = lefts
        .iter()
        .zip(ks)
        .map(|(x, k)| pack_rows(x, rows, *k))
        .collect();
    let right_words: Vec<_> = rights
        .iter()
        .zip(ks)
        .map(|(x, k)| pack_columns(x, columns[0], *k))
        .collect();
    let second_words = pack_columns(&second, columns[1], ks[0]);
    let segments: Vec<_> = ks
        .iter()
        .enumerate()
        .map(|(i, k)| Segment::whole(&left_words[i], &right_words[i], *k))
        .collect();
    let other = [Segment::whole(&left_words[0], &second_words, ks[0])];
    let jobs = [
        Job {
            segments: &segments,
            columns: columns[0],
            out_column: 2,
        },
        Job {
            segments: &other,
            columns: columns[1],
            out_column: 2 + columns[0],
        },
    ];
    let stride = columns[0] + columns[1] + 5;
    let start = random(rows * stride, 7);
    let compute = || {
        let mut out = start.clone();
        multiply_jobs(&jobs, rows, &mut out, stride, store);
        out
    };
    let out = on_threads(1, compute);
    assert_eq!(out, on_threads(2, compute), "threads");

    let before = |first: usize, count: usize| -> Vec<f32> {
        start
            .chunks(stride)
            .flat_map(|row| row[first..first + count].to_vec())
            .collect()
    };
    let part = |first: usize, count: usize| -> Vec<f32> {
        out.chunks(stride)
            .flat_map(|row| row[first..first + count].to_vec())
            .collect()
    };
    let mut expected = vec![0.0; rows * columns[0]];
    for ((left, right), &k) in lefts.iter().zip(&rights).zip(ks) {
        let shape = ProductShape {
            m: rows,
            n: columns[0],
            k,
        };
        let one = naive_product(left, (k, 1), right, (1, k), &[], shape, Store::Replace);
        expected.iter_mut().zip(one).for_each(|(sum, x)| *sum += x);
    }
    if store == Store::Add {
        expected
            .iter_mut()
            .zip(before(2, columns[0]))
            .for_each(|(sum, x)| *sum += f64::from(x));
    }
    // The operands are exact in bf16, so only the f32 sums round.
    assert_close("summed job", &part(2, columns[0]), &expected, 5e-5);
    let shape = ProductShape {
        m: rows,
        n: columns[1],
        k: ks[0],
    };
    let start_second = before(2 + columns[0], columns[1]);
    let expected = naive_product(
        &lefts[0],
        (ks[0], 1),
        &second,
        (1, ks[0]),
        &start_second,
        shape,
        store,
    );
    assert_close(
        "second job",
        &part(2 + columns[0], columns[1]),
        &expected,
        5e-5,
    );
    assert_eq!(part(0, 2), before(0, 2), "columns before the jobs stay");
    let last = 2 + columns[0] + columns[1];
    assert_eq!(
        part(last, 3),
        before(last, 3),
        "columns after the jobs stay"
    );
}

#[test]
fn jobs_are_the_sums_of_their_segments() {
    on_each_vector(|| {
        for rows in [0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130] {
            for columns in [[1, 48], [47, 16], [49, 97], [32, 31]] {
                run(rows, columns, &[33, 16, 1], Store::Replace);
                run(rows, columns, &[64], Store::Add);
            }
        }
        run(9, [50, 3], &[2100, 31, 2047, 4], Store::Replace);
        run(3, [400, 50], &[8, 8, 8, 8, 8, 8, 8, 8], Store::Add);
    });
}

#[test]
fn a_stretch_of_pairs_is_the_product_of_those_columns() {
    on_each_vector(|| a_stretch(10, 60));
}

fn a_stretch(rows: usize, columns: usize) {
    let (k, whole) = (20, 90);
    let left = rounded(&random(rows * k, 1));
    let right = rounded(&random(columns * whole, 2));
    let (left_words, right_words) = (
        pack_rows(&left, rows, k),
        pack_columns(&right, columns, whole),
    );
    let segment = Segment {
        left: &left_words,
        right: &right_words,
        right_pairs: (padded_pairs(whole), 16),
        pairs: k / 2,
    };
    let mut out = vec![f32::NAN; rows * columns];
    let job = Job {
        segments: &[segment],
        columns,
        out_column: 0,
    };
    multiply_jobs(&[job], rows, &mut out, columns, Store::Replace);
    let shape = ProductShape {
        m: rows,
        n: columns,
        k,
    };
    let expected = naive_product(
        &left,
        (k, 1),
        &right[32..],
        (1, whole),
        &[],
        shape,
        Store::Replace,
    );
    assert_close("stretch", &out, &expected, 5e-5);
}
