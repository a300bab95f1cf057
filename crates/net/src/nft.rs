//! Hands rules to nftables through `nft -j`, whose JSON is libnftables' stable interface
//! (libnftables-json(5)). All of what is handed over happens, or nothing.

use std::io;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::error::{NetError, Result};
use crate::limits::NFT_TIME;

/// Characters of what `nft` complains of that are shown.
const SAID_MAX: usize = 400;

/// Does what the commands say.
///
/// # Errors
/// [`NetError::NoNft`], [`NetError::Rules`].
pub(crate) async fn apply(commands: &Value) -> Result<()> {
    let text = commands.to_string();
    let run = async {
        // Where it is for root, whose PATH may not have it.
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
        let mut command = Command::new("nft");
        command.args(["-j", "-f", "-"]).env("PATH", path).kill_on_drop(true);
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn()?;
        if let Some(mut input) = child.stdin.take() {
            // One that ends early says why.
            let _ = input.write_all(text.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let ran = timeout(NFT_TIME, run).await;
    let ran =
        ran.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(NetError::NoNft)?;
    match ran.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&ran.stderr);
            let said: String =
                said.lines().next().unwrap_or_default().chars().take(SAID_MAX).collect();
            if said.contains("Operation not permitted") {
                return Err(NetError::Privilege("changing nftables"));
            }
            Err(NetError::Rules(said))
        }
    }
}
