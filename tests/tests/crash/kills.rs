//! Everybody is killed at moments that nobody chose.

use std::collections::BTreeMap;
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
        let mut while_busy = BTreeMap::from(Party::ALL.map(|party| (party, 0)));
        for round in 0..3_usize {
            for party in Party::ALL {
                // Each kill meets a world that has moved on since the last one.
                let before = world.books().await.vouchers.len();
                let busy = eventually("more was booked", SOON, async || {
                    let books = world.books().await;
                    let busy = books.done.len() < ORDERS * 4 / 5;
                    let more = books.vouchers.len() > before || !busy;
                    more.then_some(busy)
                        .ok_or_else(|| format!("still {before} vouchers"))
                })
                .await;
                *while_busy.entry(party).or_default() += usize::from(busy);
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
        eprintln!("killed while there was something to pay: {while_busy:?}");
        assert!(while_busy.values().all(|kills| *kills >= 1));
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), kills);
    assert_eq!(paid, (ORDERS * 4 / 5, ORDERS / 5));
    world.drained().await.hold(Floor {
        paid: ORDERS * 4 / 5,
        refused: ORDERS / 5,
        ..Floor::default()
    });
}
