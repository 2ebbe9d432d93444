//! Makes a start policy and writes it to the path given.
#![allow(clippy::print_stdout)]
use pivotal_lab::start_policy::{StartPolicySettings, hash, to_bytes, train};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("expected a path to write")?;
    let mut settings = StartPolicySettings::EMBEDDED;
    if let Some(seed) = std::env::args().nth(2) { settings.seed = seed.parse()?; }
    if let Some(steps) = std::env::args().nth(3) { settings.steps = steps.parse()?; settings.falling_steps = settings.steps * 6 / 10; }
    let stop = std::env::args().nth(4).map(|s| s.parse()).transpose()?;
    let start = std::time::Instant::now();
    let mut sum = 0.0;
    let policy = train(&settings, stop, &mut |step, metrics| {
        sum += metrics.loss;
        if step % 50 == 0 {
            println!("step {step} loss {:.4} lr {:.2e} norm {:.2} {:.1} s", sum / 50.0, metrics.lr, metrics.grad_norm, start.elapsed().as_secs_f64());
            sum = 0.0;
        }
    })?;
    let bytes = to_bytes(&policy)?;
    std::fs::write(&path, &bytes)?;
    println!("{} bytes, BLAKE3 {}", bytes.len(), hash(&bytes));
    Ok(())
}
