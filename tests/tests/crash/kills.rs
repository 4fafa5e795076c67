//! Everybody is killed at moments that nobody chose.

use std::time::{Duration, Instant};

use handfast_tests::clients::orders;
use handfast_tests::{Engines, Floor, Party, World, eventually, on_both_engines};

const SOON: Duration = Duration::from_secs(20);
const ORDERS: usize = 400;

on_both_engines! {
    everybody_is_killed_while_busy_and_the_service_is_back_within_5_s,
}

async fn everybody_is_killed_while_busy_and_the_service_is_back_within_5_s(engines: Engines) {
    let mut world = World::running(engines).await;
    let payments = world.payments();
    let orders = orders("a", ORDERS);
    let kills = async {
        for round in 0..3_usize {
            for party in Party::ALL {
                // Each kill meets a world that has moved on since the last one.
                let before = world.books().await.vouchers.len();
                eventually("more was booked", SOON, async || {
                    let books = world.books().await;
                    let more = books.vouchers.len() > before || books.done.len() >= ORDERS * 4 / 5;
                    more.then_some(())
                        .ok_or_else(|| format!("still {before} vouchers"))
                })
                .await;
                world.kill(party).await;
                let killed = Instant::now();
                world.start(party).await;
                let took = killed.elapsed();
                assert!(
                    took < Duration::from_secs(5),
                    "{party:?} took {took:?} in {round}"
                );
            }
        }
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), kills);
    assert_eq!(paid, (ORDERS * 4 / 5, ORDERS / 5));
    world.drained().await.hold(Floor {
        paid: ORDERS * 4 / 5,
        refused: ORDERS / 5,
        ..Floor::default()
    });
}
