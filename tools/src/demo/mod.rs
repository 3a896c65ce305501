//! stub
use clap::Args;
use mirror_core::error::Refusal;
/// stub
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  kagami demo --script")]
pub struct DemoArgs {}
/// stub
pub fn run(_args: &DemoArgs) -> Result<(), Refusal> {
    Ok(())
}
