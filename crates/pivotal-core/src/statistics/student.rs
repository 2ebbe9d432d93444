//! Student's t distribution.

/// The two-sided p value of a t statistic: the probability that |t| is at least this large under the null hypothesis.
///
/// By the regularised incomplete beta function, I(ν/(ν + t²); ν/2, 1/2) (Abramowitz and Stegun 26.7.1 and 26.5.8);
/// the absolute error is below 1e-12.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::student_t_p_value;
/// // With one degree of freedom, t is Cauchy: half of it lies beyond ±1.
/// assert!((student_t_p_value(1.0, 1.0) - 0.5).abs() < 1e-12);
/// ```
pub fn student_t_p_value(t: f64, degrees: f64) -> f64 {
    if t.is_infinite() {
        return 0.0;
    }
    regularised_beta(degrees / (degrees + t * t), degrees / 2.0, 0.5)
}

/// The critical value of a two-sided interval: |t| exceeds it with probability 1 − `confidence`.
///
/// `None` unless `degrees` is above 0 and `confidence` strictly between 0 and 1.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::student_t_critical;
/// // Three seeds leave two degrees of freedom: the 95 % interval is 4.303 standard errors, not 1.96.
/// assert!((student_t_critical(2.0, 0.95).unwrap() - 4.302_652_73).abs() < 1e-6);
/// ```
pub fn student_t_critical(degrees: f64, confidence: f64) -> Option<f64> {
    if !(degrees > 0.0 && confidence > 0.0 && confidence < 1.0) {
        return None;
    }
    let tail = 1.0 - confidence;
    let (mut low, mut high) = (0.0, 1.0);
    while student_t_p_value(high, degrees) > tail {
        high *= 2.0;
    }
    // The p value falls strictly with |t|; 100 halvings reach the last bit.
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if student_t_p_value(middle, degrees) > tail {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(0.5 * (low + high))
}

/// I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8), evaluated by the modified Lentz method.
fn regularised_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    // The fraction converges fast only on this side of the distribution's mean.
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - regularised_beta(1.0 - x, b, a);
    }
    let front =
        (ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (-x).ln_1p()).exp() / a;
    const TINY: f64 = 1e-300;
    let away_from_zero = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0));
    let mut fraction = d;
    for step in 1..10_000 {
        let m = f64::from(step);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / away_from_zero(1.0 + even * d);
        c = away_from_zero(1.0 + even / c);
        fraction *= d * c;
        d = 1.0 / away_from_zero(1.0 + odd * d);
        c = away_from_zero(1.0 + odd / c);
        let change = d * c;
        fraction *= change;
        if (change - 1.0).abs() < 1e-16 {
            break;
        }
    }
    front * fraction
}

/// ln Γ(x), x > 0, by Stirling's series (Abramowitz and Stegun 6.1.41) after shifting x above 15.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut shift) = (x, 0.0);
    while x < 15.0 {
        shift -= x.ln();
        x += 1.0;
    }
    let r = 1.0 / (x * x);
    let series = (1.0 / 12.0
        + r * (-1.0 / 360.0 + r * (1.0 / 1260.0 + r * (-1.0 / 1680.0 + r / 1188.0))))
        / x;
    shift + (x - 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln() + series
}

#[cfg(test)]
mod tests {
    use super::*;

    // Degrees of freedom, confidence and critical value, from mpmath 1.3.0 at 40 digits.
    const CRITICAL: [(f64, f64, f64); 8] = [
        (1.0, 0.95, 12.706204736175),
        (2.0, 0.95, 4.3026527297495),
        (4.0, 0.95, 2.7764451051978),
        (9.0, 0.95, 2.2621571627982),
        (30.0, 0.95, 2.0422724563012),
        (1000.0, 0.95, 1.9623390808264),
        (2.0, 0.99, 9.9248432009183),
        (7.0, 0.99, 3.4994832973505),
    ];

    // t, degrees of freedom and I(v/(v + t^2); v/2, 1/2), from mpmath 1.3.0 at 40 digits.
    const P_VALUES: [(f64, f64, f64); 8] = [
        (1.0, 1.0, 0.5),
        (2.5, 2.0, 0.1296117202215108),
        (4.0, 2.0, 0.05719095841793663),
        (0.1, 5.0, 0.9242301411546604),
        (2.2281388519649385, 10.0, 0.05000000000180867),
        (3.0, 29.5, 0.005443519646374829),
        (10.0, 3.0, 0.00212839905841415),
        (2.0, 1000.0, 0.04577034649325164),
    ];

    #[test]
    fn ln_gamma_of_known_values() {
        assert!((ln_gamma(0.5) - 0.5 * std::f64::consts::PI.ln()).abs() < 1e-13);
        assert!(ln_gamma(1.0).abs() < 1e-13);
        assert!((ln_gamma(10.0) - 362_880.0_f64.ln()).abs() < 1e-13);
    }

    #[test]
    fn critical_values_at_known_points() {
        for (degrees, confidence, want) in CRITICAL {
            let got = student_t_critical(degrees, confidence).unwrap();
            assert!(
                (got / want - 1.0).abs() < 1e-9,
                "{degrees}, {confidence}: {got}, expected {want}"
            );
        }
    }

    #[test]
    fn p_values_at_known_points() {
        for (t, degrees, want) in P_VALUES {
            for t in [t, -t] {
                let got = student_t_p_value(t, degrees);
                assert!(
                    (got - want).abs() < 1e-12,
                    "{t}, {degrees}: {got}, expected {want}"
                );
            }
        }
        assert_eq!(student_t_p_value(0.0, 3.0), 1.0);
        assert_eq!(student_t_p_value(f64::INFINITY, 3.0), 0.0);
    }

    #[test]
    fn what_has_no_critical_value_gets_none() {
        for (degrees, confidence) in [
            (0.0, 0.95),
            (-1.0, 0.95),
            (3.0, 0.0),
            (3.0, 1.0),
            (f64::NAN, 0.95),
        ] {
            assert_eq!(student_t_critical(degrees, confidence), None);
        }
    }
}
